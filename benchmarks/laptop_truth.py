"""The laptop fleet checked several times over, and the middle of it: ``python -m benchmarks.laptop_truth``.

One check is one draw: of the machine's speed while it calibrates, and again while it runs. Each of these calibrates
anew, in a folder of its own under ``--out``; a check that is complete there is not made again.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path

import numpy as np

from calibrate.check.check_report import (
    AT_PACE_SHOWN,
    TABLE,
    check_picture,
    figure_markdown,
    figure_table,
)
from calibrate.check.comparison import Figure, coverage
from calibrate.check.figures_file import FIGURES_FILE, read_figures
from calibrate.measure.files import MeasurementFolder, Meta
from sim.fleet_file import load_fleet
from sim.plots import save_picture
from sim.report import wide_console
from sim.spec import ALL_EXPERTS

FILE = Path(__file__).parent.parent / "examples" / "laptop.yaml"
USERS = "1,4,16,64"
CHECK = ("--minutes", "2", "--set", "run.duration_s=32", "--set", "run.warm_up_s=8", "--set", "check.repeats=2")
COMMAND = "python -m benchmarks.laptop_truth --report docs"
PICTURE = "check-laptop.png"
NOISE_SHOWN = {
    "output_throughput": "tokens/s",
    "mean_ttft_ms": "TTFT",
    "mean_tpot_ms": "TPOT",
    "mean_e2el_ms": "E2E",
    "p99_ttft_ms": "TTFT p99",
}


def run_check(folder: Path) -> None:
    """Make one check, as a user would, unless it is there.

    Raises:
        CalledProcessError: it could not be made; one whose figures are outside their tolerances is made.
    """
    if (folder / FIGURES_FILE).exists():
        return
    command = [sys.executable, "-m", "sim.cli", "check", str(FILE), "--users", USERS, *CHECK, "--out", str(folder)]
    done = subprocess.run(command, check=False)
    if done.returncode > 1:
        raise subprocess.CalledProcessError(done.returncode, command)


def calibrated(folder: Path) -> Meta:
    """Return what one check says of the machine it was calibrated on."""
    meta = MeasurementFolder.existing(folder / "calibration" / "code").meta
    assert meta is not None
    return meta


def middle(figures: Sequence[Figure]) -> Figure:
    """Return the one of several checks with the median error (of two the smaller), the noise of all pooled."""
    ordered = sorted(figures, key=lambda figure: figure.error)
    near = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    chosen = min(near, key=lambda figure: abs(figure.error))
    floors = np.array([figure.noise_floor for figure in figures])
    return replace(chosen, noise_floor=float(np.sqrt(np.mean(floors**2))))


def verdicts(figures: Sequence[Figure], single: Sequence[Sequence[Figure]], asked_coverage: float) -> list[str]:
    """Say how many of the middle figures pass, which do not, and how the single checks did."""
    judged = [figure for figure in figures if figure.passes is not None]
    failing = [figure for figure in judged if not figure.passes]
    covered = [coverage(check) for check in single]
    good = not failing and min(covered) >= asked_coverage
    lines = [
        f"- {'PASS' if good else 'FAIL'}: the median errors of {len(single)} checks are within tolerance or noise for "
        f"{len(judged) - len(failing)} of {len(judged)} judged figures; "
        f"{', '.join(f'{share:.0%}' for share in covered)} of the measured figures inside their predicted 90 % "
        f"intervals (at least {asked_coverage:.0%} asked)"
    ]
    for figure in failing:
        lines.append(
            f"  - {figure.column} at load {figure.load:g}: {figure.error:+.1%}, limit {figure.limit:.1%} "
            f"(noise {figure.noise_floor:.1%})"
        )
    alone = sum(figure.within_tolerance for figure in judged)
    floors = {NOISE_SHOWN[figure.column]: figure.noise_floor for figure in judged if figure.column in NOISE_SHOWN}
    shown = ", ".join(f"{head} {floor:.1%}" for head, floor in floors.items())
    lines.append(
        f"- {alone} of {len(judged)} are within the tolerance alone, {len(judged) - len(failing) - alone} more within "
        f"{judged[0].noise_floors:g} times the noise of one real run: {shown}"
    )
    passed = [sum(figure.passes is True for figure in check) for check in single]
    lines.append(f"- of each check by itself {', '.join(map(str, passed))} passed")
    at_pace = [replace(figure, predicted=figure.predicted_at_pace) for figure in judged]
    lines.append(
        f"- with the time that the engines' iterations really took put in, {sum(f.passes is True for f in at_pace)} of "
        f"{len(at_pace)} would pass"
    )
    return lines


def error_lines(single: Sequence[Sequence[Figure]], *, at_pace: bool) -> list[str]:
    """Return a table of every check's errors, of the figures that are shown at the engines' own pace."""
    columns = [(column, head) for column, head in TABLE if column in AT_PACE_SHOWN]
    lines = [f"| load | {' | '.join(head for _, head in columns)} |", f"| ---: |{' ---: |' * len(columns)}"]
    for load in sorted({figure.load for figure in single[0]}):
        cells = []
        for column, _ in columns:
            found = [figure for check in single for figure in check if (figure.load, figure.column) == (load, column)]
            errors = [figure.error_at_pace if at_pace else figure.error for figure in found]
            cells.append(", ".join("-" if isnan(error) else f"{error:+.1%}" for error in errors))
        lines.append(f"| {load:g} | {' | '.join(cells)} |")
    return lines


def pace_lines(folders: Sequence[Path]) -> list[str]:
    """Return a table of every engine's pace in every check."""
    found: dict[tuple[str, str], list[str]] = {}
    for folder in folders:
        with (folder / "pace.csv").open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                found.setdefault((row["load"], row["expert"]), []).append(f"{float(row['pace']):.3f}")
    lines = ["| load | expert | pace |", "| ---: | --- | ---: |"]
    return [*lines, *(f"| {load} | {expert} | {', '.join(each)} |" for (load, expert), each in found.items())]


def main() -> None:
    """Make the checks that are missing and print the middle of them; with --report write check-laptop.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checks", type=int, default=3, metavar="N", help="how many, at some 11 minutes each")
    parser.add_argument("--out", type=Path, default=Path("results/laptop"), metavar="FOLDER")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write check-laptop.md and its picture there")
    options = parser.parse_args()
    console = wide_console()
    folders = [options.out / f"check-{number}" for number in range(1, options.checks + 1)]
    for folder in folders:
        run_check(folder)
    spec = load_fleet(FILE).check.tolerances
    single = [
        [figure for figure in read_figures(folder / FIGURES_FILE, spec) if figure.expert == ALL_EXPERTS]
        for folder in folders
    ]
    figures = [middle(same) for same in zip(*single, strict=True)]
    told = verdicts(figures, single, spec.coverage)
    console.print(figure_table(figures))
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options.report is None:
        return
    made = calibrated(folders[-1])
    lines = [
        *("# laptop: predicted and measured", ""),
        f"Made on {made.date} ({made.device}; {made.expert.engine_version}, random weights, float32) by",
        *("", f"    {COMMAND}", ""),
        f"which makes this check {len(folders)} times, each with a calibration of its own:",
        *("", f"    expert-router check examples/laptop.yaml --users {USERS} {' '.join(CHECK)}", ""),
        *told,
        *("", f"![predicted and measured]({PICTURE})", ""),
        "Predicted / measured (error) of the check with the median error of each figure; bold: outside its tolerance "
        "and the noise. [Why, and what was looked for](checking.md#how-near-can-it-be).",
        *("", *figure_markdown(figures), "", "Errors of each check:", ""),
        *error_lines(single, at_pace=False),
        *("", "The same with the time that the engines' iterations really took put into the prediction:", ""),
        *error_lines(single, at_pace=True),
        *("", "That time, as a multiple of what the profile says of the same batches:", ""),
        *pace_lines(folders),
    ]
    (options.report / "check-laptop.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    title = f"laptop: predicted and measured, the median of {len(folders)} checks"
    save_picture(check_picture(figures, title), options.report / PICTURE, "png")


if __name__ == "__main__":
    main()
