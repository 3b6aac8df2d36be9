from dataclasses import replace
from io import StringIO
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from calibrate.check.batch_sizes import BATCH_BINS, batch_shares, bin_labels
from calibrate.check.check import CheckOutcome, as_json
from calibrate.check.check_report import check_markdown, print_check, write_check
from calibrate.check.comparison import COLUMNS, JUDGED, Figure, compare, coverage
from calibrate.check.pace import Pace
from calibrate.check.station_times import STATIONS, station_times
from sim.check_spec import CheckSpec
from sim.fleet_file import load_fleet
from sim.records import RunRecord
from sim.result import Measured, Result
from tests.profiles import make_profile
from tests.run_records import make_fleet, make_result, make_run

FLEET = make_fleet("one")
SPEC = CheckSpec()


def result_of(*records: RunRecord) -> Result:
    """A result that holds just these records."""
    return replace(make_result(), fleets={"one": FLEET}, runs=list(records))


def figure(**changes: float) -> Figure:
    known: dict[str, float] = {
        "predicted": 110.0,
        "predicted_low": 100.0,
        "predicted_high": 120.0,
        "measured": 100.0,
        "measured_low": 98.0,
        "measured_high": 102.0,
        "noise_floor": 0.01,
        "tolerance": 0.05,
        "noise_floors": 2.0,
    }
    return Figure(load=8.0, expert="all", column="mean_e2el_ms", **(known | changes))


def test_a_run_compared_with_itself_has_no_error_and_passes() -> None:
    run = make_run(FLEET, 8)
    figures = compare([result_of(run)], [[result_of(run)]], [result_of(run)], "one", SPEC)
    assert {f.expert for f in figures} == {"all", "expert-0", "expert-1"}
    assert {f.column for f in figures} == set(COLUMNS)
    for f in figures:
        assert f.error == 0
        assert f.covered is True
    judged = [f for f in figures if f.passes is not None]
    assert {f.column for f in judged} == set(JUDGED)
    assert all(f.passes for f in judged)


def test_an_error_passes_within_its_tolerance_or_twice_the_noise() -> None:
    assert figure(predicted=104.9).passes is True
    assert figure(predicted=105.1).passes is False
    assert figure(predicted=94.9).passes is False
    assert figure(predicted=109, noise_floor=0.05).passes is True
    assert figure(predicted=109, noise_floor=0.05, noise_floors=1.0).passes is False
    assert figure(predicted=109, noise_floor=nan).passes is False, "a single run tells nothing of the noise"
    assert figure(tolerance=nan).passes is None, "shown, not judged"


def test_coverage_counts_measured_figures_inside_predicted_intervals() -> None:
    inside, outside, unknown = figure(), figure(measured=130.0), figure(predicted_low=nan)
    assert (inside.covered, outside.covered, unknown.covered) == (True, False, None)
    assert coverage([inside, outside, unknown]) == 0.5
    assert isnan(coverage([unknown]))


def test_repeats_tell_the_noise_and_bounds_the_interval() -> None:
    runs = [make_run(FLEET, 8, slowness=slowness) for slowness in (0.95, 1.0, 1.05)]
    bounds = [[result_of(run)] for run in runs]
    figures = compare([result_of(runs[1])] * 3, bounds, [result_of(run) for run in runs], "one", SPEC)
    mean = next(f for f in figures if f.column == "mean_ttft_ms" and f.expert == "all")
    values = [row["mean_ttft_ms"] for run in runs for row in result_of(run).replication_rows if row["expert"] == "all"]
    assert mean.measured == pytest.approx(np.mean(values))
    assert mean.noise_floor == pytest.approx(np.std(values, ddof=1) / np.mean(values))
    assert (mean.predicted_low, mean.predicted_high) == pytest.approx((min(values), max(values)))


def test_the_noise_is_pooled_over_the_loads() -> None:
    quiet = [make_run(FLEET, 8) for _ in range(2)]
    noisy = [make_run(FLEET, 32, slowness=slowness) for slowness in (0.9, 1.1)]
    real = [result_of(first, second) for first, second in zip(quiet, noisy, strict=True)]
    figures = compare([real[0]] * 2, [], real, "one", SPEC)
    floors = {f.load: f.noise_floor for f in figures if f.column == "mean_tpot_ms" and f.expert == "all"}
    values = np.array(
        [f["mean_tpot_ms"] for r in real for f in r.replication_rows if f["expert"] == "all" and f["users"] == 32]
    )
    assert floors[8] == floors[32]
    assert floors[8] == pytest.approx(values.std(ddof=1) / values.mean() / 2**0.5)


def test_every_repeat_is_compared_with_its_own_draw_of_requests() -> None:
    draws = [make_run(FLEET, 8, slowness=slowness) for slowness in (0.8, 1.2)]
    simulated = [result_of(run) for run in draws]
    bounds = [[result_of(make_run(FLEET, 8, slowness=slowness)) for slowness in (0.7, 1.1)]]
    figures = compare(simulated, bounds, simulated, "one", SPEC)
    mean = next(f for f in figures if f.column == "mean_ttft_ms" and f.expert == "all")
    assert mean.error == 0
    assert mean.noise_floor == 0, "draws differ, errors do not"
    low = [row["mean_ttft_ms"] for result in bounds[0] for row in result.replication_rows if row["expert"] == "all"]
    assert mean.predicted_low == pytest.approx(np.mean(low))


def test_the_noise_is_that_of_the_real_runs_whatever_predictions_differ_by() -> None:
    real = [result_of(make_run(FLEET, 8, slowness=slowness)) for slowness in (1.0, 1.02)]
    wild = [result_of(make_run(FLEET, 8, slowness=slowness)) for slowness in (0.5, 2.0)]

    def floor(simulated: list[Result]) -> float:
        figures = compare(simulated, [], real, "one", SPEC)
        return next(f.noise_floor for f in figures if f.column == "mean_e2el_ms" and f.expert == "all")

    assert floor(wild) == pytest.approx(floor([real[0], real[0]]))


def test_what_is_predicted_at_the_engines_pace_is_an_error_of_its_own() -> None:
    run, slower = make_run(FLEET, 8), make_run(FLEET, 8, slowness=1.1)
    figures = compare([result_of(run)], [], [result_of(slower)], "one", SPEC, at_pace=[result_of(slower)])
    mean = next(f for f in figures if f.column == "mean_e2el_ms" and f.expert == "all")
    assert mean.error < -0.03
    assert mean.error_at_pace == 0


def test_the_bootstrap_holds_the_mean_and_narrows_with_more_requests() -> None:
    widths = []
    for requests in (400, 6400):
        run = make_run(FLEET, 8, requests=requests)
        figures = compare([result_of(run)], [], [result_of(run)], "one", SPEC)
        mean = next(f for f in figures if f.column == "mean_e2el_ms" and f.expert == "all")
        assert mean.measured_low < mean.measured < mean.measured_high
        widths.append((mean.measured_high - mean.measured_low) / mean.measured)
    assert widths[1] < 0.5 * widths[0]


def test_a_load_that_was_not_measured_is_not_compared() -> None:
    predicted = result_of(make_run(FLEET, 8), make_run(FLEET, 32))
    figures = compare([predicted], [], [result_of(make_run(FLEET, 8))], "one", SPEC)
    assert {f.load for f in figures} == {8.0}


def test_stations_add_up_to_the_end_to_end_time() -> None:
    run = make_run(FLEET, 8)
    rows = station_times([run], [run])
    for name in ("all", *run.expert_names):
        of_expert = [row for row in rows if row.expert == name]
        assert [row.station for row in of_expert] == list(STATIONS)
        total_s = sum(row.simulated_s for row in of_expert)
        done = (run.requests["status"] == 0) & (run.requests["last_token_s"] <= run.window_s[1])
        if name != "all":
            done &= run.requests["expert_index"] == run.expert_names.index(name)
        spent_s = (run.requests["last_token_s"] - run.requests["sent_s"])[done]
        assert total_s == pytest.approx(spent_s.mean())


def test_times_inside_a_real_engine_are_its_own_and_unknown_without_them() -> None:
    run = make_run(FLEET, 8)
    told = replace(
        run,
        replicas=tuple(
            replace(r, engine_requests=10 * (1 + k), engine_prefill_s=0.2 * k, engine_decode_s=1.0, engine_e2e_s=1.5)
            for k, r in enumerate(run.replicas)
        ),
    )
    at = {row.station: row for row in station_times([run], [told]) if row.expert == "all"}
    weights = [10 * (1 + k) for k in range(len(run.replicas))]
    expected_s = np.average([0.2 * k for k in range(len(run.replicas))], weights=weights)
    assert at["prefill"].measured_s == pytest.approx(expected_s)
    assert at["front end and queue"].measured_s == pytest.approx(0.5 - expected_s)
    silent = {row.station: row for row in station_times([run], [run]) if row.expert == "all"}
    assert isnan(silent["decode"].measured_s)
    assert not isnan(silent["router"].measured_s)


def test_batch_shares_are_of_iterations() -> None:
    shares = batch_shares(np.array([1, 1, 2, 4, 600]))
    by_label = dict(zip(bin_labels(BATCH_BINS), shares, strict=True))
    assert by_label["1"] == 0.4
    assert by_label["3-4"] == 0.2
    assert by_label["513+"] == 0.2
    assert sum(shares) == pytest.approx(1)
    assert all(isnan(share) for share in batch_shares(np.array([], dtype=np.int64)))


def outcome_of(slowness: float) -> CheckOutcome:
    predicted, real = make_run(FLEET, 8), make_run(FLEET, 8, slowness=slowness)
    figures = compare([result_of(predicted)], [[result_of(predicted)]], [result_of(real)], "one", SPEC)
    return CheckOutcome(
        file=make_result().file,
        fleet="one",
        predicted=[result_of(predicted)],
        measured=[result_of(real)],
        figures=figures,
        stations=station_times([predicted], [real]),
        paces=[Pace(load=8.0, expert="expert-0", pace=1.1, low=1.0, high=1.2, iterations=900, known=1.0)],
        batches={"expert-0/0": (batch_shares(np.array([1, 2])), batch_shares(np.array([2, 2])))},
    )


def test_a_good_prediction_passes_and_a_bad_one_names_what_is_off() -> None:
    good, bad = outcome_of(1.0), outcome_of(1.6)
    assert good.passed
    assert good.remarks()[0].startswith("PASS")
    assert not bad.passed
    remarks = bad.remarks()
    assert remarks[0].startswith("FAIL")
    assert any("mean_e2el_ms at load 8" in line for line in remarks)
    assert any(line.startswith("furthest apart at load 8: router of") for line in remarks), "the engines told nothing"


def test_too_few_figures_in_their_intervals_fail_a_check() -> None:
    outcome = outcome_of(1.0)
    wide = [replace(f, predicted_low=f.measured * 1.01, predicted_high=f.measured * 1.02) for f in outcome.figures]
    assert not replace(outcome, figures=wide).passed


def test_a_profile_of_another_engine_version_is_told(tmp_path: Path) -> None:
    path = tmp_path / "code.profile.json"
    path.write_text(make_profile("old", model="laptop-37m", gpu="CPU").model_dump_json())
    file = load_fleet("examples/laptop.yaml", [f"fleets.laptop.experts.code.profile={path}"])
    outcome = outcome_of(1.0)
    ran = Measured(started="now", urls={}, engines={"laptop": {"code": "vLLM 9.9", "chat": "vLLM 9.9"}})
    outcome = replace(outcome, file=file, fleet="laptop", measured=[replace(outcome.measured[0], measured=ran)])
    (told,) = [line for line in outcome.remarks() if "measure it again" in line]
    assert told.startswith("expert code: the profile old is of made up and vLLM 9.9 ran")


def test_files_tables_and_json_of_a_check(tmp_path: Path) -> None:
    outcome = outcome_of(1.6)
    written = write_check(outcome, tmp_path)
    assert [path.name for path in written] == ["check.csv", "stations.csv", "pace.csv", "check.png", "check.md"]
    assert all(path.stat().st_size > 50 for path in written)
    assert "**" in check_markdown(outcome), "what is outside its tolerance is bold"
    assert '"passed": false' in as_json(outcome)
    stream = StringIO()
    print_check(outcome, Console(file=stream, width=200))
    assert "FAIL" in stream.getvalue()
    assert "front end and queue" in stream.getvalue()
    assert "pace" in stream.getvalue()
    assert "| 8 | expert-0 1.100 |" in check_markdown(outcome)
