"""``expert-router calibrate measure``: real engines, measured for a few minutes each, become profiles."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from calibrate.measure import Outcome, Progress
    from calibrate.measure_grid import Lengths
    from calibrate.measured_experts import DistinctExpert
    from sim.fleet_file import LoadedFleetFile

_MODEL_FILE = """\
name: measured
workload:
  classes: {{any: {{prompt_tokens: 1, output_tokens: 1}}}}
  load: {{kind: closed_loop, users: 1}}
fleets:
  measured:
    experts:
      {name}: {{model: {model}, quantization: {quantization}, gpu: {gpu}}}
"""


@click.command("measure", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--fleet", "fleets", multiple=True, metavar="NAME", help="Only experts of this fleet; may be repeated.")
@click.option("--expert", "experts", multiple=True, metavar="NAME", help="Only this expert; may be repeated.")
@click.option("--model", help="Measure this model instead of a file's experts.")
@click.option("--quantization", help="With --model; default: bf16.")
@click.option("--gpu", help="With --model; CPU measures the machine itself.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a value of the file.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    help="Of measuring, per engine; starting it is not counted.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results/calibration"),
    show_default=True,
    help="Folder for records and profiles; an interrupted measurement in it goes on.",
)
def measure_command(
    file: Path | None,
    fleets: tuple[str, ...],
    experts: tuple[str, ...],
    model: str | None,
    quantization: str | None,
    gpu: str | None,
    overrides: tuple[str, ...],
    minutes: float,
    out: Path,
) -> None:
    """Start each different engine of FILE for real, measure it, and write profiles and a calibrated fleet file.

    DIR gets, per expert, a folder of records (Parquet) that is complete after every point and EXPERT.profile.json; and
    fleet.calibrated.yaml, which ``simulate`` takes as it is. The same command again goes on where an interrupted one
    stopped. For the time being the machine should do nothing else.
    """
    from calibrate.engine_under_test import EngineGoneError
    from calibrate.measured_experts import distinct_experts
    from calibrate.measurement_files import MeasurementError
    from sim.fleet_file import FleetFileError, load_fleet, parse_fleet

    messages = Console(stderr=True)
    if (file is None) == (model is None):
        raise click.UsageError("give either a fleet file or --model and --gpu")
    if model is not None and gpu is None:
        raise click.UsageError("--model needs --gpu, such as --gpu CPU")
    if model is None and (gpu or quantization):
        raise click.UsageError("--gpu and --quantization go with --model; a fleet file states its own")
    try:
        if file is not None:
            fleet_file = load_fleet(file, overrides)
        else:
            text = _MODEL_FILE.format(name=model, model=model, quantization=quantization or "bf16", gpu=gpu)
            fleet_file = parse_fleet(text, overrides)
        chosen = distinct_experts(fleet_file, fleets, experts)
        complete = _measure_all(fleet_file, chosen, minutes, out, messages, whole_file=file is not None)
    except (FleetFileError, MeasurementError, EngineGoneError, ValueError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        messages.print(f"stopped; finished points are in {out}, the same command goes on", highlight=False)
        raise SystemExit(130) from None
    if not complete:
        raise SystemExit(1)


def _measure_all(
    file: "LoadedFleetFile",
    chosen: "list[DistinctExpert]",
    minutes: float,
    out: Path,
    messages: Console,
    *,
    whole_file: bool,
) -> bool:
    """Measure every expert and write what comes of it; return whether all were measured completely."""
    from calibrate.measured_experts import CALIBRATED_FILE, calibrated_yaml, write_text

    complete = True
    profiles: dict[tuple[str, str], str] = {}
    for expert in chosen:
        outcome = _measure_one(file, expert, minutes, out, messages, own_lengths=not whole_file)
        _fit_and_write(expert.name, outcome, out, messages)
        profiles |= dict.fromkeys(expert.places, f"{expert.name}.profile.json")
        complete = complete and outcome.complete
    if whole_file:
        note = f"written by {_command_line()}"
        write_text(out / CALIBRATED_FILE, calibrated_yaml(file, profiles, {}, note))
        messages.print(
            f"wrote {out / CALIBRATED_FILE}; expert-router simulate {out / CALIBRATED_FILE}", highlight=False
        )
    return complete


def _measure_one(
    file: "LoadedFleetFile",
    expert: "DistinctExpert",
    minutes: float,
    out: Path,
    messages: Console,
    *,
    own_lengths: bool,
) -> "Outcome":
    from calibrate.engine_under_test import RunningExpert
    from calibrate.measure import measure_expert

    with _progress(messages, 60 * minutes) as progress:
        outcome = measure_expert(
            expert.name,
            expert.spec,
            folder=out / expert.name,
            lengths=_lengths(file, expert, own_lengths=own_lengths),
            minutes=minutes,
            start=RunningExpert,
            cores=_cores(file, expert),
            port=file.serve.expert_port,
            command=_command_line().split(" "),
            progress=progress,
        )
    if not outcome.complete:
        messages.print(outcome.reason, style="red", highlight=False, markup=False, soft_wrap=True)
        meta = outcome.measured.meta
        kept = 0 if meta is None else len(meta.points)
        messages.print(f"{expert.name}: {kept} points are kept; the same command goes on from there", highlight=False)
    return outcome


def _lengths(file: "LoadedFleetFile", expert: "DistinctExpert", *, own_lengths: bool) -> "Lengths":
    from calibrate.measure_grid import lengths_of
    from sim.resolve import engine_limits
    from sim.traces import read_workload_data

    max_model_len = engine_limits(expert.spec)[0]
    if own_lengths:
        return lengths_of(None, read_workload_data(file.workload), max_model_len)
    return lengths_of(file.workload, read_workload_data(file.workload), max_model_len)


def _cores(file: "LoadedFleetFile", expert: "DistinctExpert") -> tuple[int, ...]:
    """The cores that the expert's first replica gets when its fleet is served."""
    from real.cores import place_replicas

    fleet, name = expert.places[0]
    placements, _ = place_replicas(file.fleets[fleet].experts)
    return placements[name][0].cores


def _fit_and_write(name: str, outcome: "Outcome", out: Path, messages: Console) -> None:
    from calibrate.measure_report import print_measured
    from calibrate.measured_experts import write_text
    from calibrate.measured_profile import fit_folder

    found = fit_folder(outcome.measured)
    path = out / f"{name}.profile.json"
    write_text(path, found.profile.model_dump_json(indent=1) + "\n")
    print_measured(name, found, Console())
    messages.print(f"wrote {path}", highlight=False)


@contextmanager
def _progress(console: Console, budget_s: float) -> "Iterator[Progress]":
    """Show what is measured and the time left; on a terminal as a bar, elsewhere a line at each engine."""
    if not console.is_terminal:
        yield lambda measured_s, what: None if "starting" not in what else console.print(what, highlight=False)
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=budget_s, left="")

        def show(measured_s: float, what: str) -> None:
            left_s = max(0.0, budget_s - measured_s)
            bar.update(
                task, completed=measured_s, description=what, left=f"{left_s // 60:.0f}:{left_s % 60:02.0f} left"
            )

        yield show


def _command_line() -> str:
    """The command as typed."""
    return shlex.join(["expert-router", *sys.argv[1:]])
