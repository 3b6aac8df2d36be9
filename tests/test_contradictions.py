from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from calibrate.predictor import PredictedEngine
from calibrate.tables.contradictions import MARGIN, contradictions, doubtful_runs
from calibrate.tables.measured_runs import MeasuredRun, read_measured_runs
from calibrate.validate.accuracy_report import checked_for_real, write_accuracy_report
from calibrate.validate.error_report import print_validation
from calibrate.validate.validate import validate
from tests.fleets import AffineCurve
from tests.measured_tables import GROUND_TRUTH, engine_of, run_of


def saturated(name: str, in_flight: int, gap_s: float, **fields: object) -> MeasuredRun:
    return run_of(
        run_id=name,
        exp=name,
        arch="dense",
        load_type="saturated_closed_loop",
        concurrency_mean=float(in_flight),
        itl_p50_s=gap_s,
        **({"workload": "chat", "output_tokens_mean": 400.0} | fields),
    )


RUNS = [saturated("chat/8", 8, 0.010), saturated("chat/64", 64, 0.015), saturated("chat/256", 256, 0.030)]


def test_times_that_grow_with_the_work_contradict_nothing() -> None:
    assert contradictions(RUNS) == []
    assert doubtful_runs(RUNS) == []


def test_more_time_for_less_work_contradicts_and_its_series_is_doubted() -> None:
    exams = [saturated(f"exam/{n}", n, gap_s, workload="exam") for n, gap_s in ((4, 0.040), (128, 0.028))]
    (found,) = contradictions([*RUNS, *exams])
    assert (found.slower, found.faster) == ("exam/4", "chat/8")
    assert found.ratio == pytest.approx(4)
    assert doubtful_runs([*RUNS, *exams]) == ["exam/4", "exam/128"]


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": "A100-80GB"},
        {"model": "llama-2-7b"},
        {"tp": 2},
        {"quantization": "fp8"},
        {"flag": "odd"},
        {"load_type": "open_loop"},
    ],
)
def test_another_engine_or_a_flag_is_no_contradiction(changes: dict[str, object]) -> None:
    slow = replace(saturated("slow", 4, 0.040), **changes)  # type: ignore[arg-type]
    assert contradictions([*RUNS, slow]) == []


def test_fewer_in_flight_with_more_kv_to_read_is_no_contradiction() -> None:
    assert contradictions([*RUNS, saturated("long", 250, 0.040, output_tokens_mean=1500.0)]) == []
    assert len(contradictions([*RUNS, saturated("short", 250, 0.040)])) == 1


def test_noise_is_no_contradiction() -> None:
    assert contradictions([*RUNS, saturated("again", 4, 0.010 * MARGIN * 0.99)]) == []
    assert len(contradictions([*RUNS, saturated("again", 4, 0.010 * MARGIN * 1.01)])) == 1


@pytest.mark.skipif(not (GROUND_TRUTH / "serving_runs.csv").is_file(), reason="no table of measured runs here")
def test_the_series_doubted_in_the_shared_runs_are_of_one_workload_on_one_gpu() -> None:
    doubted = doubtful_runs(read_measured_runs(GROUND_TRUTH / "serving_runs.csv"))
    assert len(doubted) == 11
    assert all("/gpqa/B200x1/" in run_id for run_id in doubted)


def test_report_and_terminal_give_the_errors_with_and_without_doubted_runs(tmp_path: Path) -> None:
    runs = [*RUNS[:2], saturated("exam/4", 4, 0.040, workload="exam")]
    engine = engine_of(AffineCurve(fixed_s=0.008, per_request_s=1e-4))
    found = validate(runs, {}, lambda experiment: Known(engine), workers=1, replications=1)
    console = Console(record=True, width=120)
    print_validation(found, console)
    assert "1 runs contradict others of the table: exam/4" in console.export_text()
    page, _ = write_accuracy_report(found, tmp_path, command="made up", peers=None)
    text = page.read_text(encoding="utf-8")
    assert "## Runs that contradict others" in text
    assert "- exam/4: 4.0 times chat/8" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| itl_p50 | 3 |") and line.count("|") == 6]
    assert "| 2 |" in row


class Known:
    """Knows one engine."""

    def __init__(self, engine: PredictedEngine) -> None:
        self._engine = engine

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        return self._engine


def test_the_report_quotes_the_real_checks_beside_it(tmp_path: Path) -> None:
    assert checked_for_real(tmp_path) == []
    (tmp_path / "check-mine.md").write_text("# mine: checked\n\nMade on a desk by\n\n    it\n\n- PASS: all\n- 2\n- 3\n")
    heading, _, lines = checked_for_real(tmp_path)
    assert heading == "## Checked for real"
    assert lines == "- [mine: checked](check-mine.md). Made on a desk\n  - PASS: all\n  - 2"
