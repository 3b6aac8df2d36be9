"""The whole promise on this machine: calibrate two real engines, predict their fleet, run it, compare."""

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from real.processes.guarded_process import child_environment

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make install-cpu)"),
]

ROOT = Path(__file__).parents[2]
LARGEST_ERROR = 0.25
JUDGED = ("output_throughput", "mean_tpot_ms", "mean_e2el_ms")
SETTINGS = ("run.duration_s=40", "run.warm_up_s=6", "check.repeats=1")


def test_a_fleet_is_predicted_within_a_quarter_of_what_it_then_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from sim.cli import main; main()", "check", "examples/laptop.yaml"]
    command += ["--users", "2,8", "--minutes", "1", "--out", str(tmp_path)]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    found = subprocess.run(
        command, cwd=ROOT, env=child_environment({}), capture_output=True, text=True, timeout=1500, check=False
    )
    print(found.stdout)  # the table, whatever comes of it
    assert found.returncode in (0, 1), found.stderr
    with (tmp_path / "check.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["expert"] == "all" and row["metric"] in JUDGED]
    assert {(row["load"], row["metric"]) for row in rows} == {(load, name) for load in ("2", "8") for name in JUDGED}
    errors = {(row["load"], row["metric"]): float(row["error_pct"]) / 100 for row in rows}
    assert max(map(abs, errors.values())) <= LARGEST_ERROR, errors
