"""What ``simulate`` says of a real GPU, beside what it did: ``python -m benchmarks.gpu_truth``.

``calibrate/data/h200`` holds what ``check examples/one_gpu.yaml`` measured on an H200: records of each engine, from
which a profile is fitted, and real users through the real gateway, which the fit has not seen. This simulates the same
loads, with the profile and with the roofline that anybody has without measuring.
"""

import argparse
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path

import pandas as pd

from calibrate.check.check_report import check_picture, figure_markdown, figure_table
from calibrate.check.comparison import COLUMNS, Figure
from calibrate.measure.fleet import ROUTER_FILE
from calibrate.measure.router import RouterCosts
from sim.fleet_file import load_fleet
from sim.plots import save_picture
from sim.report import wide_console
from sim.result import Result
from sim.run import simulate, with_changes
from sim.spec import ALL_EXPERTS

FILE = Path(__file__).parent.parent / "examples" / "one_gpu.yaml"
DATA = Path(__file__).parent.parent / "calibrate" / "data" / "h200"
FLEETS = {"bf16": 18.0, "fp8": 16.0}
"""Name -> seconds that each load was measured for, 4 of them to warm up."""
WARM_UP_S = 4.0
FEW_USERS = 32
MEANS = {
    "throughput": ("request_throughput", "output_throughput"),
    "TPOT": ("mean_tpot_ms",),
    "E2E": ("mean_e2el_ms",),
    "TTFT": ("mean_ttft_ms",),
}
MADE = "Measured on an NVIDIA H200 with 16 virtual cores (vLLM 0.26.0) on 26 November 2026, predicted"
COMMAND = "python -m benchmarks.gpu_truth --report docs"


def measured_of(fleet: str) -> pd.DataFrame:
    """Return the summary of the real users of a fleet, one row a load."""
    rows = pd.read_csv(DATA / "check" / fleet / "summary.csv")
    return rows[rows["expert"] == ALL_EXPERTS].set_index("users")


def predicted_of(fleet: str, users: Sequence[int], *, profile: bool) -> Result:
    """Return the simulation of the loads that were measured."""
    router = RouterCosts.model_validate_json((DATA / ROUTER_FILE).read_text(encoding="utf-8"))
    changes = [
        f"fleets.{fleet}.experts.chat.gpu=H200",
        f"run.duration_s={FLEETS[fleet]}",
        f"run.warm_up_s={WARM_UP_S}",
        *(f"fleets.{fleet}.router.{name}={value}" for name, value in router),
    ]
    if profile:
        changes.append(f"fleets.{fleet}.experts.chat.profile={(DATA / f'{fleet}.profile.json').resolve()}")
    file = with_changes(load_fleet(FILE, changes), users=list(users), seed=None, replications=3)
    return simulate(file.model_copy(update={"fleets": {fleet: file.fleets[fleet]}}))


def figures_of(fleet: str, *, profile: bool) -> list[Figure]:
    """Return predicted and measured figures of a fleet at all its loads."""
    measured = measured_of(fleet)
    rows = predicted_of(fleet, [int(load) for load in measured.index], profile=profile).summary
    predicted = rows[rows["expert"] == ALL_EXPERTS].set_index("users")
    return [
        Figure(
            load=float(load),
            expert=ALL_EXPERTS,
            column=column,
            predicted=float(predicted.loc[load, column]),
            predicted_low=nan,
            predicted_high=nan,
            measured=float(measured.loc[load, column]),
            measured_low=nan,
            measured_high=nan,
            noise_floor=nan,
            tolerance=nan,
            noise_floors=0.0,
        )
        for load in measured.index
        for column in COLUMNS
        if not isnan(float(measured.loc[load, column]))
    ]


def verdict(fleet: str, figures: Sequence[Figure]) -> str:
    """Say in one line how far the means of a fleet are off, for few users and for many."""
    parts = []
    for who, chosen in (
        (f"up to {FEW_USERS} users", [each for each in figures if each.load <= FEW_USERS]),
        ("with more", [each for each in figures if each.load > FEW_USERS]),
    ):
        worst = {
            what: max(abs(each.error) for each in chosen if each.column in columns) for what, columns in MEANS.items()
        }
        parts.append(f"{who} {', '.join(f'{what} within {error:.0%}' for what, error in worst.items())}")
    return f"{fleet}, with the profile that was measured there: {'; '.join(parts)}"


def main() -> None:
    """Print the tables; with --report also write them as check-gpu.md with a picture of each fleet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write check-gpu.md and its pictures there")
    options = parser.parse_args()
    console = wide_console()
    verdicts: list[str] = []
    lines: list[str] = []
    for fleet in FLEETS:
        for profile in (True, False):
            figures = figures_of(fleet, profile=profile)
            title = f"Llama 3 8B in {fleet} on an H200, predicted with {_source(profile)}"
            console.print(title)
            console.print(figure_table(figures))
            lines += [f"{title}:", "", *figure_markdown(figures), ""]
            if not profile:
                continue
            verdicts.append(verdict(fleet, figures))
            console.print(verdicts[-1], highlight=False)
            if options.report is not None:
                name = f"check-gpu-{fleet}.png"
                save_picture(check_picture(figures, title), options.report / name, "png")
                lines += [f"![predicted and measured]({name})", ""]
    if options.report is not None:
        head = ["# one-gpu: predicted and measured", "", f"{MADE} by", "", f"    {COMMAND}", ""]
        head += [*(f"- {line}" for line in verdicts), "", "Predicted / measured (error). [What it means](gpu.md).", ""]
        (options.report / "check-gpu.md").write_text("\n".join([*head, *lines]), encoding="utf-8")


def _source(profile: bool) -> str:
    return "the profile that was measured there" if profile else "the roofline, not calibrated"


if __name__ == "__main__":
    main()
