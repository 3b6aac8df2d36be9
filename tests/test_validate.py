import csv
from dataclasses import replace
from math import exp, inf, isfinite, log, nan
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from calibrate.predictor import CannotPredictError, PredictedEngine, Predictor
from calibrate.tables.measured_runs import MeasuredRun
from calibrate.validate.accuracy_report import read_peer_figures
from calibrate.validate.conformal import interval_factors
from calibrate.validate.error_tables import GROUPINGS, summaries
from calibrate.validate.validate import ErrorRow, validate, with_intervals
from sim.cli import main
from sim.service_curve import CurveSource, DecodePiece, IterationWork
from sim.streams import stream
from tests.fleets import AffineCurve
from tests.measured_tables import GROUND_TRUTH, ROW, engine_of, run_of, write_table

CURVE = AffineCurve(fixed_s=0.008, per_request_s=1e-4, per_prefill_token_s=2e-5)


class WithSource:
    """A curve that says another thing of itself."""

    def __init__(self, curve: AffineCurve, source: CurveSource) -> None:
        self._curve = curve
        self.source = source

    def iteration_s(self, work: IterationWork) -> float:
        return self._curve.iteration_s(work)

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        return self._curve.decode_piece(decodes, decode_kv_tokens)


class Affine:
    """Knows one curve, and no mixtures of experts."""

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        if run.arch == "moe":
            raise CannotPredictError("a mixture of experts")
        return engine_of(CURVE)


def experiments(n: int, **fields: object) -> list[MeasuredRun]:
    return [
        run_of(run_id=f"ours/{i}/s0", exp=f"ours/{i}", n_requests=60, e2e_mean_s=0.9 + 0.05 * i, **fields)
        for i in range(n)
    ]


def row_of(i: int, error: float) -> ErrorRow:
    return ErrorRow(
        run_id=str(i),
        metric="e2e_mean",
        measured=exp(error),
        predicted=1.0,
        lower=nan,
        upper=nan,
        ape_pct=abs(exp(error) - 1) * 100,
        regime="light",
        profile="test",
        note="",
    )


# ----------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("stages", [1, 3])
def test_intervals_cover_ninety_percent_of_exchangeable_experiments(stages: int) -> None:
    rng = stream(1, "errors", stages)
    covered = []
    for _ in range(60):
        server = np.repeat(rng.normal(0, 0.05, 30), stages)  # what the stages of one server have in common
        errors = np.abs(server + rng.normal(0, 0.02, len(server)))
        names = np.repeat(np.arange(30), stages).astype(str).tolist()
        covered.append(np.mean(errors <= np.log(interval_factors(errors, names, 0.9)) + 1e-12))
    assert 0.88 < np.mean(covered) < 0.94


def test_the_own_experiment_is_never_in_its_own_interval() -> None:
    errors = np.array([0.01 * (1 + i) for i in range(20)])
    names = [str(i // 2) for i in range(20)]
    before = interval_factors(errors, names, 0.8)
    errors[[6, 7]] = 99.0  # both stages of experiment 3
    after = interval_factors(errors, names, 0.8)
    assert after[6] == before[6]
    assert after[7] == before[7]
    assert (after[[0, 1]] >= before[[0, 1]]).all()


def test_the_quantile_is_the_finite_sample_one() -> None:
    errors = np.arange(1, 11) / 100
    # Nine others: the 90 % bound is ceil(10 * 0.9) = 9th smallest, the largest of them.
    factors = interval_factors(errors, [str(i) for i in range(10)], 0.9)
    assert factors[0] == pytest.approx(exp(0.10))
    assert factors[9] == pytest.approx(exp(0.09))


def test_too_few_experiments_give_no_interval() -> None:
    assert interval_factors(np.array([0.1] * 9), [str(i) for i in range(9)], 0.9).tolist() == [inf] * 9
    rows = with_intervals([row_of(i, 0.1) for i in range(9)], {str(i): str(i) for i in range(9)})
    assert not any(isfinite(row.upper) for row in rows)


def test_a_row_thought_twice_as_uncertain_has_the_square_of_the_factor_and_coverage_stays() -> None:
    errors = np.abs(stream(5, "errors").normal(size=400))
    units = np.where(np.arange(400) % 4 == 0, 3.0, 1.0)
    names = [str(i) for i in range(400)]
    factors = interval_factors(errors * units, names, 0.9, units)
    assert factors[0] == pytest.approx(factors[1] ** 3, rel=0.05)
    assert np.mean(errors * units <= np.log(factors)) == pytest.approx(0.9, abs=0.02)
    assert np.mean((errors * units <= np.log(factors))[units == 3]) == pytest.approx(0.9, abs=0.05)


def test_intervals_widen_beyond_the_fitted_range() -> None:
    runs = experiments(20, rate_rps=5.0)
    source = CurveSource(label="fit", detail="fit", max_decodes=3, error_growth_per_doubling=1.0)

    class Small:
        def engine_of(self, run: MeasuredRun) -> PredictedEngine:
            known = engine_of(CURVE)
            return replace(known, curve=WithSource(CURVE, source)) if run.exp == "ours/0" else known

    def widths(predictor: Predictor) -> list[float]:
        found = validate(runs, {}, lambda experiment: predictor, workers=1, replications=1)
        return [row.upper / row.lower for row in found.rows if row.metric == "e2e_mean"]

    beyond, inside = widths(Small()), widths(Affine())
    assert beyond[0] > 1.5 * inside[0]
    assert beyond[1] == pytest.approx(inside[1], rel=0.2)


def test_mixtures_are_judged_by_mixtures() -> None:
    rows = [row_of(i, 0.01 if i < 20 else 0.5) for i in range(40)]
    kinds = {str(i): "dense" if i < 20 else "moe" for i in range(40)}
    found = with_intervals(rows, {str(i): str(i) for i in range(40)}, kinds=kinds)
    assert found[0].upper == pytest.approx(exp(0.01))
    assert found[30].upper == pytest.approx(exp(0.5))


def test_an_interval_is_a_factor_either_side_of_the_prediction() -> None:
    rows = with_intervals([row_of(i, 0.1) for i in range(20)], {str(i): str(i) for i in range(20)})
    assert rows[0].upper == pytest.approx(exp(0.1))
    assert log(rows[0].lower) == pytest.approx(-log(rows[0].upper))
    assert rows[0].covered


# ----------------------------------------------------------------------------------------------------------- validation


def test_every_measured_figure_has_a_row_and_skipped_runs_say_why() -> None:
    runs = experiments(11)
    runs += [
        run_of(run_id="moe", exp="moe", arch="moe", e2e_mean_s=1.0, ttft_mean_s=0.1),
        run_of(run_id="flagged", exp="flagged", flag="overloaded", e2e_mean_s=1.0),
        run_of(run_id="no rate", exp="no rate", rate_rps=nan, e2e_mean_s=1.0),
        run_of(run_id="nothing", exp="nothing"),
    ]
    found = validate(runs, {}, lambda experiment: Affine(), workers=1, replications=1)
    assert len(found.rows) == 11 + 2 + 1 + 1
    assert {skipped.run_id: skipped.reason for skipped in found.skipped} == {
        "moe": "a mixture of experts",
        "flagged": "flagged: overloaded",
        "no rate": "neither its arrivals nor their rate (rate_rps) are known",
        "nothing": "none of the figures to compare was measured",
    }
    by_run = {row.run_id: row for row in found.rows}
    assert by_run["flagged"].note == "not simulated: flagged: overloaded"
    assert not isfinite(by_run["flagged"].predicted)
    first = by_run["ours/0/s0"]
    assert first.lower < first.predicted < first.upper
    assert first.ape_pct == pytest.approx(abs(first.predicted / first.measured - 1) * 100)
    assert summaries(found, GROUPINGS["model"])["llama-3.1-8b"]["e2e_mean"].runs == 11


def test_flagged_runs_are_simulated_on_request() -> None:
    runs = experiments(1, flag="cold_start")
    assert not validate(runs, {}, lambda experiment: Affine(), flagged=True, workers=1).skipped


def test_each_experiment_gets_its_own_predictor_once() -> None:
    asked: list[str] = []

    def predictor_for(experiment: str) -> Predictor:
        asked.append(experiment)
        return Affine()

    runs = experiments(3)
    runs.append(replace(runs[0], run_id="ours/0/s1", stage=1))
    validate(runs, {}, predictor_for, workers=1, replications=1)
    assert asked == ["ours/0", "ours/1", "ours/2"]


def test_the_outcome_does_not_depend_on_the_number_of_processes() -> None:
    runs = experiments(4)
    one, two = (validate(runs, {}, lambda experiment: Affine(), workers=n, replications=1) for n in (1, 2))
    assert [(row.run_id, row.predicted) for row in one.rows] == [(row.run_id, row.predicted) for row in two.rows]


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_errors_and_report(tmp_path: Path) -> None:
    rows = [ROW | {"run_id": f"ours/{i}", "exp": f"ours/{i}", "n_requests": "40"} for i in range(3)]
    rows.append(ROW | {"run_id": "other", "exp": "other", "gpu": "abacus"})
    table = write_table(tmp_path / "runs.csv", rows)
    arguments = ["--out", str(tmp_path / "errors.csv"), "--report", str(tmp_path / "docs"), "--workers", "1"]
    outcome = CliRunner().invoke(main, ["calibrate", "validate", str(table), *arguments])
    assert outcome.exit_code == 0, outcome.output
    assert "unknown GPU 'abacus'" in outcome.output
    with (tmp_path / "errors.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    columns = ["run_id", "metric", "measured", "predicted", "lower", "upper", "ape_pct", "regime", "profile", "note"]
    assert list(written[0]) == columns
    assert [row["profile"] for row in written] == ["roofline"] * 3 + [""]
    page = (tmp_path / "docs" / "accuracy.md").read_text()
    assert "expert-router calibrate validate runs.csv" in page
    assert str(tmp_path) not in page
    assert (tmp_path / "docs" / "accuracy.png").stat().st_size > 10_000


def test_mistakes_end_the_command_with_status_2(tmp_path: Path) -> None:
    table = write_table(tmp_path / "runs.csv", [ROW | {"tp": "two"}])
    for arguments in (
        [str(table)],
        [str(tmp_path / "none.csv")],
        [str(table), "--peers", "x.csv"],
        [str(table), "--profile", "x.json", "--leave-one-out"],
        [str(table), "--engine", "gpu=H100"],
        [str(tmp_path / "none.json"), "--engine", "gpu=H100"],
    ):
        assert CliRunner().invoke(main, ["calibrate", "validate", *arguments]).exit_code == 2, arguments


def test_the_best_peer_is_one_that_was_not_fitted_on_the_runs(tmp_path: Path) -> None:
    peer = {
        "simulator": "a",
        "subset": "dense",
        "level": "summary",
        "metric": "e2e_mean",
        "n_points": "20",
        "mape_mean_pct": "9.5",
        "mape_median_pct": "6.6",
        "trained_on_these": "False",
        "source_file": "records.csv",
    }
    rows = [
        peer,
        peer | {"simulator": "b", "mape_mean_pct": "2", "trained_on_these": "True"},
        peer | {"simulator": "c", "mape_mean_pct": "3", "n_points": "4"},
        peer | {"simulator": "d", "mape_mean_pct": "12"},
        peer | {"simulator": "e", "metric": "tpot_mean", "mape_mean_pct": "1"},
        peer | {"simulator": "f", "metric": "tpot_mean_corrected", "mape_mean_pct": "10"},
    ]
    found = read_peer_figures(write_table(tmp_path / "peers.csv", rows))
    assert {metric: figure.simulator for metric, figure in found.items()} == {"e2e_mean": "a", "tpot_mean": "f"}


RUNS = GROUND_TRUTH / "serving_runs.csv"


@pytest.mark.skipif(not RUNS.is_file(), reason=f"no {RUNS}; set EXPERT_ROUTER_GROUND_TRUTH to its folder")
def test_the_roofline_meets_light_and_loaded_dense_runs_within_ten_percent() -> None:
    from calibrate.tables.measured_runs import read_measured_runs
    from calibrate.validate.roofline_predictor import RooflinePredictor

    runs = [run for run in read_measured_runs(RUNS) if run.run_id.startswith("blis55") and run.arch == "dense"]
    found = validate(runs, {}, lambda experiment: RooflinePredictor(), workers=1, replications=1)
    errors = summaries(found)["all"]
    assert errors["e2e_mean"].runs >= 30
    for metric in ("tpot_mean", "e2e_mean", "ttft_mean"):
        assert errors[metric].mean_pct < 10, metric
