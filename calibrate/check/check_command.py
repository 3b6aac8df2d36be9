"""``expert-router check``: calibrate what is not calibrated and run for real, by turns; simulate, compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from sim.simulate_command import UserList

if TYPE_CHECKING:
    from calibrate.measure.fleet import FleetMeasurement
    from real.serving.fleet import RunningFleet
    from sim.fleet_file import LoadedFleetFile


@click.command("check", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--fleet", "fleet_name", help="Which fleet of the file; needed when it has several.")
@click.option("--users", type=UserList(), help="Loads instead of the file's: 1,8,32.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a value of the file.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=3.0,
    show_default=True,
    help="Of measuring each engine that has no profile.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results/check"),
    show_default=True,
    help="Folder for calibration, logs, records, tables and the picture; a calibration already in it is used.",
)
@click.option("--json", "as_json", is_flag=True, help="Print verdict and figures as JSON instead of tables.")
def command(
    file: Path,
    fleet_name: str | None,
    users: list[int] | None,
    overrides: tuple[str, ...],
    minutes: float,
    out: Path,
    as_json: bool,
) -> None:
    """Predict the fleet of FILE, run it for real on this machine, and put both side by side.

    The real users send the very requests that the simulated ones send. Exit status: 0 when every judged figure is
    within the tolerances of the file's ``check`` part, 1 when one is not, 2 for a file or a machine that cannot work.
    """
    from calibrate.check.check import as_json as outcome_json
    from calibrate.check.check import check
    from calibrate.check.check_report import print_check, write_check
    from calibrate.check.turns import take_turns
    from real.experts.expert_server import EngineFailedError
    from real.serving.fleet import RunningFleet, engines_of, only_fleet
    from sim.fleet_file import FleetFileError, load_fleet
    from sim.report import wide_console
    from sim.run import with_changes
    from sim.simulate_command import make_folder
    from sim.traces import TraceError

    messages = Console(stderr=True)
    try:
        make_folder(out)
        fleet_file = load_fleet(file, overrides)
        fleet = only_fleet(fleet_file) if fleet_name is None else fleet_name
        changed = with_changes(fleet_file, users=users, seed=None, replications=None)  # a mistake is told at once
        served = RunningFleet(
            fleet_file,
            fleet,
            logs=out / "logs",
            tell=lambda line: messages.print(line, highlight=False, markup=False, soft_wrap=True),
        )
        calibration = _calibration(fleet_file, served, out / "calibration", messages)
        step = partial(_step, messages)
        with engines_of(served):
            measured, stopped = take_turns(changed, served, calibration, minutes=minutes, folder=out, step=step)
            if calibration is not None:
                calibrated = _calibrated(calibration, out / "calibration")
                changed = with_changes(calibrated, users=users, seed=None, replications=None)
        logs = {(each.plan.expert, each.plan.replica): each.log for each in served.servers}
        outcome = check(changed, fleet, measured, logs, folder=out, step=step, interrupted=stopped)
    except (FleetFileError, TraceError, EngineFailedError, ValueError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        messages.print(
            f"stopped before anything could be compared; the calibration and the records of finished runs are in {out}",
            highlight=False,
        )
        raise SystemExit(130) from None
    if not outcome.figures:
        messages.print("no load was measured to its end: nothing to compare", style="yellow")
        raise SystemExit(130 if outcome.interrupted else 1)
    if as_json:
        click.echo(outcome_json(outcome))
    else:
        print_check(outcome, wide_console())
    written = write_check(outcome, out)
    messages.print(f"wrote {', '.join(path.name for path in written)} to {out}", highlight=False)
    raise SystemExit(130 if outcome.interrupted else 0 if outcome.passed else 1)


def _calibration(
    file: "LoadedFleetFile", served: "RunningFleet", folder: Path, messages: Console
) -> "FleetMeasurement | None":
    """What is to be measured: each expert of the fleet that names no profile, if there is one.

    The engines that are to serve are themselves measured: to start others takes as long as a good part of measuring.
    """
    from calibrate.measure.engine_under_test import served_by
    from calibrate.measure.fleet import FleetMeasurement
    from calibrate.measure.measured_experts import distinct_experts

    missing = [each for each in distinct_experts(file, [served.name]) if each.spec.profile is None]
    if not missing:
        return None
    return FleetMeasurement(file, missing, out=folder, messages=messages, console=messages, start=served_by(served))


def _calibrated(calibration: "FleetMeasurement", folder: Path) -> "LoadedFleetFile":
    """Fit what was measured and return the file with it.

    Raises:
        MeasurementError: too little was measured.
    """
    from calibrate.measure.measured_experts import CALIBRATED_FILE
    from sim.fleet_file import load_fleet

    for expert in calibration.experts:
        calibration.fit(expert)
    calibration.write()
    return load_fleet(folder / CALIBRATED_FILE)


@contextmanager
def _step(console: Console, what: str) -> Iterator[Callable[[float], None] | None]:
    """Show one step: a bar with the time left on a terminal, a line elsewhere."""
    if not console.is_terminal:
        console.print(what, highlight=False)
        yield None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn(what), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)
