"""What was measured on a GPU stays predicted as well as it was."""

from pathlib import Path

import pytest

from benchmarks.gpu_truth import DATA, FILE, figures_of
from calibrate.check.comparison import Figure
from calibrate.measure.files import MeasurementFolder
from sim.fleet_file import load_fleet
from sim.resolve import engine_settings


def by_load(fleet: str, *, profile: bool) -> dict[tuple[float, str], Figure]:
    return {(each.load, each.column): each for each in figures_of(fleet, profile=profile)}


@pytest.mark.parametrize(("fleet", "load", "limit"), [("bf16", 1.0, 0.05), ("bf16", 32.0, 0.1), ("fp8", 32.0, 0.16)])
def test_few_users_are_predicted(fleet: str, load: float, limit: float) -> None:
    """The measured means at 1 and 32 users; many users wait for turns of an event loop that nothing here models."""
    found = by_load(fleet, profile=True)
    for column in ("output_throughput", "mean_tpot_ms"):
        assert abs(found[load, column].error) < limit, column


def test_measuring_is_worth_it() -> None:
    measured, derived = by_load("bf16", profile=True), by_load("bf16", profile=False)
    for load in (32.0, 512.0):
        assert abs(measured[load, "output_throughput"].error) < 0.5 * abs(derived[load, "output_throughput"].error)


@pytest.mark.parametrize("fleet", ["bf16", "fp8"])
def test_kv_blocks_are_those_that_the_engine_resolved(fleet: str) -> None:
    meta = MeasurementFolder.existing(Path(DATA) / fleet).meta
    assert meta is not None
    expert = load_fleet(FILE, [f"fleets.{fleet}.experts.chat.gpu=H200"]).fleets[fleet].experts["chat"]
    assert engine_settings(expert).num_kv_blocks + 1 == pytest.approx(meta.num_gpu_blocks, rel=0.03)
