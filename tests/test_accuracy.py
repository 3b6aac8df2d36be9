"""Accuracy on measured runs does not get worse: a fixed part of them, each predicted by a fit without its experiment.

``python -m tests.test_accuracy`` prints the table; ``--write`` makes it the new baseline.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from calibrate.fit.held_out import leave_one_out
from calibrate.tables.measured_runs import read_measured_requests, read_measured_runs
from calibrate.validate.validate import validate
from tests.test_memory import GROUND_TRUTH

BASELINE = Path(__file__).parent / "data" / "accuracy_baseline.json"
METRICS = ("ttft_mean", "tpot_mean", "e2e_mean", "e2e_p99")
SOURCES = ("blis16/", "blis55/")
GROWTH = 1.1
"""An error may grow by a tenth over the baseline."""


def mean_errors_percent() -> dict[str, float]:
    """Mean absolute error of each metric over the unflagged dense open-loop runs of the two serving data sets."""
    runs = read_measured_runs(GROUND_TRUTH / "serving_runs.csv")
    chosen = [run for run in runs if run.run_id.startswith(SOURCES) and run.arch == "dense" and not run.flag]
    requests = read_measured_requests(GROUND_TRUTH / "requests.csv.gz")
    outcome = validate(chosen, requests, leave_one_out(runs), replications=1)
    errors = {name: [row.ape_pct for row in outcome.predicted_rows if row.metric == name] for name in METRICS}
    return {name: round(float(np.mean(values)), 2) for name, values in errors.items()} | {
        "runs": float(len(errors["e2e_mean"]))
    }


@pytest.mark.skipif(
    not (GROUND_TRUTH / "serving_runs.csv").is_file(), reason=f"the measured runs are not at {GROUND_TRUTH}"
)
def test_no_error_grows_by_more_than_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    baseline: dict[str, float] = json.loads(BASELINE.read_text())
    errors = mean_errors_percent()
    with capsys.disabled():
        print_table(errors, baseline)
    assert errors["runs"] == baseline["runs"]
    for name in METRICS:
        assert errors[name] <= GROWTH * baseline[name], f"{name}: {errors[name]} %, was {baseline[name]} %"


def print_table(errors: dict[str, float], baseline: dict[str, float]) -> None:
    print(f"\nmean absolute error over {errors['runs']:.0f} measured runs, their experiment left out of the fit")
    for name in METRICS:
        print(f"  {name:10} {errors[name]:6.2f} %   baseline {baseline.get(name, float('nan')):6.2f} %")


if __name__ == "__main__":
    found = mean_errors_percent()
    print_table(found, json.loads(BASELINE.read_text()) if BASELINE.is_file() else {})
    if "--write" in sys.argv:
        BASELINE.write_text(json.dumps(found, indent=1) + "\n")
