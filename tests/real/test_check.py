"""The whole promise on this machine: calibrate two real engines, predict their fleet, run it, compare.

The machine may be busy with other things, so of what was calibrated nothing depends on how fast it is.
"""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from calibrate.calibrate_command import command
from calibrate.measure.files import MeasurementFolder
from calibrate.measure.fleet import ROUTER_FILE, FleetMeasurement
from calibrate.measure.measured_experts import CALIBRATED_FILE, distinct_experts, without_profiles
from calibrate.measure.router import RouterCosts
from real.processes.guarded_process import child_environment
from sim.fleet_file import load_fleet
from sim.run import simulate
from tests.kit.served_fleet import free_ports
from tests.real_fleet import ROOT, cli

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make install-cpu)"),
]

LARGEST_ERROR = 0.25
JUDGED = ("output_throughput", "mean_tpot_ms", "mean_e2el_ms")
SETTINGS = ("run.duration_s=40", "run.warm_up_s=6", "check.repeats=1")
MINUTES = 1
EXPERTS = ("code", "chat")
SAME_PACE = 0.15
"""By what share engines may be slower or faster than when they were measured, on a machine that is left alone."""


@pytest.fixture(scope="module")
def temporary() -> Iterator[str]:
    """What the command takes for the system's temporary folder; its path must be short."""
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        yield folder


@pytest.fixture(scope="module")
def checked(temporary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that ``expert-router check`` leaves behind."""
    out = tmp_path_factory.mktemp("check")
    words = ["check", "examples/laptop.yaml", "--users", "2,8", "--minutes", str(MINUTES), "--out", str(out)]
    words += [word for setting in (*SETTINGS, *free_ports(25100)) for word in ("--set", setting)]
    home = str(tmp_path_factory.mktemp("home"))
    environment = child_environment({"EXPERT_ROUTER_HOME": home, "TMPDIR": temporary})
    found = subprocess.run(
        cli(words), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    print(found.stdout)  # the table, whatever comes of it
    assert found.returncode in (0, 1), found.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERT_ROUTER_HOME", home)
        yield out


@pytest.fixture(scope="module")
def calibration(checked: Path) -> Path:
    return checked / "calibration"


def test_a_fleet_is_predicted_within_a_quarter_of_what_it_then_does(checked: Path) -> None:
    """As predicted, where the engines kept the pace at which they were measured; and at their own pace in any case.

    Others may have slowed the machine in between: by how much, the iterations' own times tell.
    """
    with (checked / "check.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["expert"] == "all" and row["metric"] in JUDGED]
    assert {(row["load"], row["metric"]) for row in rows} == {(load, name) for load in ("2", "8") for name in JUDGED}
    with (checked / "pace.csv").open(encoding="utf-8") as stream:
        paces = [float(row["pace"]) for row in csv.DictReader(stream)]
    assert len(paces) == 2 * len(EXPERTS)
    columns = ["error_at_pace_pct"]
    if max(abs(pace - 1) for pace in paces) <= SAME_PACE:
        columns.append("error_pct")
    for column in columns:
        errors = {(row["load"], row["metric"]): float(row[column]) / 100 for row in rows}
        assert max(map(abs, errors.values())) <= LARGEST_ERROR, (column, errors, paces)


def test_nothing_is_left_in_the_temporary_folder(checked: Path, temporary: str) -> None:
    assert [path.name for path in Path(temporary).iterdir()] == []


@pytest.mark.parametrize("expert", EXPERTS)
def test_every_logged_batch_is_the_simulated_schedulers(calibration: Path, expert: str) -> None:
    folder = MeasurementFolder.existing(calibration / expert)
    assert folder.meta is not None
    assert folder.iterations["matched"].mean() > 0.99
    assert folder.meta.num_gpu_blocks == 257
    assert folder.meta.expert.engine_version.startswith("vLLM ")


def test_live_batches_agree(calibration: Path) -> None:
    folders = [str(calibration / expert) for expert in EXPERTS]
    result = CliRunner().invoke(command, ["batches", *folders, "--at-least", "0.8"])
    assert result.exit_code == 0, result.output


def test_the_calibrated_file_simulates_as_it_is(calibration: Path) -> None:
    file = load_fleet(calibration / CALIBRATED_FILE)
    assert all(expert.profile is not None for expert in file.fleets["laptop"].experts.values())
    assert len(simulate(file, users=[2], workers=1).summary) == 3
    costs = RouterCosts.model_validate_json((calibration / ROUTER_FILE).read_text())
    router = file.fleets["laptop"].router
    assert router is not None
    assert router.per_request_s == costs.per_request_s > 0
    assert costs.per_output_token_s > 0


def test_what_was_measured_is_not_measured_again(calibration: Path) -> None:
    before = {expert: (calibration / expert / "meta.json").read_bytes() for expert in EXPERTS}
    file = without_profiles(load_fleet(calibration / CALIBRATED_FILE))
    console = Console(file=sys.stderr)
    again = FleetMeasurement(file, distinct_experts(file), out=calibration, messages=console, console=console)
    for expert in again.experts:
        assert again.measure(expert, minutes=MINUTES)
    assert {expert: (calibration / expert / "meta.json").read_bytes() for expert in EXPERTS} == before
