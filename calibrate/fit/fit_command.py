"""``expert-router calibrate fit``: from a table of measured runs to profiles."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from sim.report import wide_console

if TYPE_CHECKING:
    from calibrate.fit.experts import ExpertKey
    from calibrate.fit.fit import Calibration
    from calibrate.fit.parameters import EngineGroup


@click.command("fit", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", type=click.Path(path_type=Path))
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="MODEL/QUANTIZATION/GPU/TP",
    help="Write a profile of this expert, measured or not; may be repeated. Default: all that were measured.",
)
@click.option("--llama-family", is_flag=True, help="Write profiles of the Llama experts that come with the package.")
@click.option(
    "--static-batch",
    "static_batch",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also fit static batches (CSV): requests that start and end together, without a server.",
)
@click.option(
    "--operators",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Kernel efficiencies from these operator times (CSV) instead of the packaged ones.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("profiles"),
    show_default=True,
    help="Folder for the profiles.",
)
@click.option(
    "--engine", metavar="NAME", help="End of the profiles' names, such as vllm-0.15; default: from the version."
)
@click.option(
    "--engine-version",
    metavar="TEXT",
    help="Whose overheads the profiles take, such as 'vLLM 0.15.1'; default: the version most rows were measured on.",
)
def fit_command(
    runs: Path,
    experts: tuple[str, ...],
    llama_family: bool,
    static_batch: Path | None,
    operators: Path | None,
    out: Path,
    engine: str | None,
    engine_version: str | None,
) -> None:
    """Fit corrections of the roofline and engine overheads to RUNS (CSV) and write one profile per expert.

    Engines before vLLM 0.8 (V0) have other kernels and are fitted apart, to what was measured on them; --engine-version
    decides whose parameters the profiles take.

    Prints every parameter with its interval, the errors on experiments left out of the fit, what was not used and why,
    and what to measure next. RUNS may also be a folder that ``calibrate measure`` wrote: its engines' iterations then
    become profiles of terms, with what they were measured on and with.
    """
    from calibrate.fit.experts import expert_key
    from calibrate.fit.experts import llama_family as llama_experts
    from calibrate.fit.fit import fit
    from calibrate.fit.fit_report import print_fit, print_suggestions
    from calibrate.fit.held_out import find_held_out_errors, held_out_errors
    from calibrate.fit.next_measurements import candidate_points, knowledge, suggest
    from calibrate.fit.operators import operator_factors, read_operators
    from calibrate.fit.parameters import group_of_version
    from calibrate.fit.profiles import make_profile, provenance_of, write_profiles
    from calibrate.tables.measured_runs import read_measured_runs
    from calibrate.tables.static_batch import read_static_batches

    messages, console = Console(stderr=True), wide_console()
    if runs.is_dir():
        from calibrate.measure.folder_fit import fit_folders

        if experts or llama_family or engine or engine_version:
            raise click.UsageError(
                f"{runs} is a folder of measurements, which say what they are of: only --out applies"
            )
        fit_folders(runs, out, messages, console)
        return
    try:
        asked = [*map(expert_key, experts)]
        measured = read_measured_runs(runs)
        if static_batch is not None:
            measured += read_static_batches(static_batch)
        factors = None if operators is None else operator_factors(read_operators(operators))
        version = engine_version or _commonest_version(fit(measured, resamples=0, factors=factors))
        group = group_of_version(version)
        calibration = fit(measured, kernels=group.kernels, factors=factors)
        calibration.point_overhead(group)  # a group that was not measured ends here
        errors = find_held_out_errors(measured, group, factors)
        if llama_family:
            asked += llama_experts(("bf16", *errors.by_quantization))
        keys = list(dict.fromkeys(asked)) or _measured_experts(calibration, group)
        profiles = [
            make_profile(
                calibration,
                group,
                key,
                engine=engine or _short(version),
                engine_version=version,
                held_out=errors,
                provenance=provenance_of(calibration),
            )
            for key in keys
        ]
        written = write_profiles(profiles, out)
    except (ValueError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    known = {each: knowledge(calibration, each) for each in calibration.overheads}
    held_out = {
        each: errors.by_experiment if each is group else held_out_errors(measured, each, factors=factors)
        for each in known
    }
    print_fit(calibration, known, held_out, console)
    worst = known[group][0]
    points = candidate_points(_suggestible(calibration, keys), version)
    print_suggestions(group, worst, suggest(calibration, group, worst.name, points), console)
    messages.print(f"wrote {len(written)} profiles to {out}", highlight=False)


def _commonest_version(calibration: "Calibration") -> str:
    """Return the engine version of most stages; the first in the table of equally common ones."""
    return Counter(seen.run.engine_version for seen in calibration.observations).most_common(1)[0][0]


def _short(version: str) -> str:
    """Return ``vllm-0.15`` for "vLLM 0.15.1" and "0.15.1 (a fork)", and ``vllm`` for a text without a version."""
    found = re.search(r"(\d+)\.(\d+)", version)
    return f"vllm-{found[1]}.{found[2]}" if found else "vllm"


def _measured_experts(calibration: "Calibration", group: "EngineGroup") -> "list[ExpertKey]":
    from calibrate.fit.experts import key_of

    return sorted({key_of(seen.run) for seen in calibration.observations if seen.group is group})


def _suggestible(calibration: "Calibration", keys: "list[ExpertKey]") -> "list[ExpertKey]":
    """Return the models measured or asked for, on the GPUs measured or asked for, in every split."""
    from calibrate.fit.experts import TENSOR_PARALLEL_SIZES, key_of

    named = sorted({*keys, *(key_of(seen.run) for seen in calibration.observations)})
    models = dict.fromkeys((model, quantization) for model, quantization, _, _ in named)
    gpus = dict.fromkeys(gpu for _, _, gpu, _ in named)
    return [(*model, gpu, size) for model in models for gpu in gpus for size in TENSOR_PARALLEL_SIZES]
