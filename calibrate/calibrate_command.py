"""``expert-router calibrate``: its commands, and how wrong predictions are on measured runs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource
from rich.console import Console

from sim.report import wide_console

if TYPE_CHECKING:
    from calibrate.predictor import Predictor

HELP = {"help_option_names": ["-h", "--help"]}
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group("calibrate", context_settings=HELP)
def command() -> None:
    """Measure real engines, fit profiles, and tell how wrong predictions are."""


@command.command("validate", context_settings=HELP)
@click.argument("runs", type=FILE)
@click.option(
    "--requests", "requests_file", type=FILE, help="Arrivals and lengths of single requests, joined by run_id."
)
@click.option(
    "--engine",
    "engine",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="What served a result file of a load generator: gpu=H100, tp=2, max_num_seqs=256; may be repeated.",
)
@click.option("--profile", "profiles", type=FILE, multiple=True, help="Predict with this profile; may be repeated.")
@click.option("--leave-one-out", is_flag=True, help="Predict each experiment by a fit to all the others in RUNS.")
@click.option("--out", type=FILE, help="Write one row per run and metric to this CSV file.")
@click.option("--flagged", is_flag=True, help="Also simulate runs with a flag.")
@click.option("--report", type=FOLDER, help="Write accuracy.md and its picture into this folder.")
@click.option("--peers", type=FILE, help="Errors of other simulators, to show beside ours in the report.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of loads not recorded.")
@click.option("--replications", type=click.IntRange(min=1), default=3, show_default=True, help="Of loads not recorded.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: one per core.")
def validate_command(
    runs: Path,
    requests_file: Path | None,
    engine: tuple[str, ...],
    profiles: tuple[Path, ...],
    leave_one_out: bool,
    out: Path | None,
    flagged: bool,
    report: Path | None,
    peers: Path | None,
    seed: int,
    replications: int,
    workers: int | None,
) -> None:
    """Simulate every run of RUNS again and tell the error of every figure that was measured.

    RUNS is a table (CSV), or a result of vllm bench serve --save-detailed, GuideLLM (benchmarks.json) or AIPerf
    (profile_export.jsonl), for which --engine says what served it.

    The roofline predicts unless --profile or --leave-one-out says otherwise. A run that cannot be simulated is listed
    with the reason.
    """
    from calibrate.tables.bench_results import SUFFIXES, read_bench_results
    from calibrate.tables.csv_table import TableError
    from calibrate.tables.measured_runs import read_measured_requests, read_measured_runs, run_of_settings
    from calibrate.validate.error_report import print_validation
    from calibrate.validate.roofline_predictor import ProfilePredictor, RooflinePredictor
    from calibrate.validate.validate import validate, write_errors
    from sim.catalogue import UnknownNameError
    from sim.profile import ProfileError
    from sim.simulate_command import progress_bar

    messages = Console(stderr=True)
    if profiles and leave_one_out:
        raise click.UsageError("--profile and --leave-one-out exclude each other")
    if engine and runs.suffix not in SUFFIXES:
        raise click.UsageError("--engine is for result files; a table says itself what served its runs")
    if peers is not None and report is None:
        raise click.UsageError("--peers needs --report, the folder to write into")
    try:
        requests = {} if requests_file is None else read_measured_requests(requests_file)
        if runs.suffix in SUFFIXES:
            imported = read_bench_results(runs, run_of_settings(engine))
            measured = [run for run, _ in imported]
            requests |= {run.run_id: sent for run, sent in imported}
        else:
            measured = read_measured_runs(runs)
        predictor_for: Callable[[str], Predictor]
        if leave_one_out:
            from calibrate.fit.held_out import leave_one_out as fits_without

            predictor_for = fits_without(measured)
        else:
            predictor_for = _always(ProfilePredictor(profiles) if profiles else RooflinePredictor())
        with progress_bar(messages) as progress:
            found = validate(
                measured,
                requests,
                predictor_for,
                flagged=flagged,
                seed=seed,
                replications=replications,
                workers=workers,
                progress=progress,
            )
        print_validation(found, wide_console())
        if out is not None:
            write_errors(found, out)
            messages.print(f"wrote {len(found.rows)} rows to {out}", highlight=False)
        if report is not None:
            from calibrate.validate.accuracy_report import write_accuracy_report

            written = write_accuracy_report(found, report, command=_command_line(), peers=peers)
            messages.print(f"wrote {', '.join(str(path) for path in written)}", highlight=False)
    except (TableError, ProfileError, UnknownNameError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None


def _always(predictor: "Predictor") -> "Callable[[str], Predictor]":
    """Return a predictor that was fitted on none of the experiments for each of them."""
    return lambda experiment: predictor


def _command_line() -> str:
    """Return the command as typed, with the names of files and without their folders."""
    context = click.get_current_context()
    words = ["expert-router calibrate validate"]
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if context.get_parameter_source(parameter.name or "") is ParameterSource.DEFAULT:
            continue
        option = [] if isinstance(parameter, click.Argument) else [parameter.opts[-1]]
        for each in value if isinstance(value, tuple) else [value]:
            words += option if each is True else [*option, each.name if isinstance(each, Path) else str(each)]
    return " ".join(words)


from calibrate.fit.compare_command import compare_command  # noqa: E402
from calibrate.fit.fit_command import fit_command  # noqa: E402
from calibrate.measure.batches_command import batches_command  # noqa: E402
from calibrate.measure.measure_command import measure_command  # noqa: E402

command.add_command(batches_command)
command.add_command(compare_command)
command.add_command(fit_command)
command.add_command(measure_command)
