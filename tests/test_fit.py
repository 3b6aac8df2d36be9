from dataclasses import replace
from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.fit.fit import NOISE, PRIOR_SPREAD, Calibration, fit
from calibrate.fit.held_out import error_growth, held_out_errors, leave_one_out
from calibrate.fit.observations import observe
from calibrate.fit.parameters import ASYNCHRONOUS, CORRECTIONS, OVERHEADS, SYNCHRONOUS, Estimate, group_of_version
from calibrate.predictor import CannotPredictError
from calibrate.tables.measured_runs import MeasuredRun
from sim.factors import packaged_factors
from sim.service_curve import IterationWork
from tests.synthetic_runs import ENGINES, TRUTH, by_linear_model, by_roofline, loads, with_noise


def estimates(calibration: Calibration) -> dict[str, Estimate]:
    return {**calibration.corrections, **calibration.overheads[ASYNCHRONOUS]}


def values(calibration: Calibration) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates(calibration).items()}


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    return [by_linear_model(load) for load in loads()]


@pytest.fixture(scope="module")
def calibration(runs: list[MeasuredRun]) -> Calibration:
    return fit(with_noise(runs, 0.02, np.random.default_rng(1)))


# ------------------------------------------------------------------------------------------------------- recovery


def test_recovers_overheads_exactly_where_the_roofline_is_right() -> None:
    truth = TRUTH | dict.fromkeys(CORRECTIONS, 1.0)
    found = fit([by_linear_model(load, truth) for load in loads()], resamples=0)
    assert values(found) == pytest.approx(truth, rel=1e-6)


def test_the_linear_model_is_the_steady_state_of_a_corrected_roofline() -> None:
    linear = [by_linear_model(load).tpot_mean_s for load in loads()]
    assert linear == pytest.approx([by_roofline(load).tpot_mean_s for load in loads()], rel=1e-3)


def test_recovers_the_parameters_of_a_corrected_roofline() -> None:
    found = fit([by_roofline(load) for load in loads()])
    for name, estimate in estimates(found).items():
        assert estimate.low < TRUTH[name] < estimate.high, name
    assert values(found)["matrix"] == pytest.approx(TRUTH["matrix"], rel=0.01)
    assert np.abs(found.errors).max() < 0.01


@pytest.mark.parametrize("spread", [0.01, 0.03])
def test_noise_moves_parameters_less_than_their_intervals_say(runs: list[MeasuredRun], spread: float) -> None:
    found = fit(with_noise(runs, spread, np.random.default_rng(2)))
    missed = [name for name, estimate in estimates(found).items() if not estimate.low <= TRUTH[name] <= estimate.high]
    assert len(missed) <= 1
    assert np.median(np.abs(found.errors)) < spread


def test_gross_outliers_hardly_move_predictions(runs: list[MeasuredRun]) -> None:
    noisy = with_noise(runs, 0.01, np.random.default_rng(3))
    odd = {5, 17, 40, 61}
    spoiled = [replace(run, tpot_mean_s=2 * run.tpot_mean_s) if n in odd else run for n, run in enumerate(noisy)]
    # twice the time is twice as many in flight at the same rate: halve it, so that only the time is odd
    spoiled = [replace(run, rate_rps=run.rate_rps / 2) if n in odd else run for n, run in enumerate(spoiled)]
    found = fit(spoiled, resamples=0)
    clean = [abs(error) for n, error in enumerate(found.errors) if n not in odd]
    assert max(clean) < 0.05
    assert np.median(clean) < 0.015
    assert all(found.errors[n] < -0.4 for n in odd)


def test_a_correction_that_no_run_tells_of_stays_at_one_with_its_priors_interval(runs: list[MeasuredRun]) -> None:
    found = fit([run for run in runs if run.tp == 1]).corrections["all_reduce"]
    assert found.value == pytest.approx(1.0, abs=1e-6)
    assert found.high - found.low == pytest.approx(2 * 1.645 * PRIOR_SPREAD["all_reduce"], rel=0.01)


def test_an_overhead_that_no_run_tells_of_is_the_rooflines_with_a_wide_interval(runs: list[MeasuredRun]) -> None:
    found = fit([run for run in runs if not run.model.startswith("qwen")]).overheads[ASYNCHRONOUS]["top_k_passes"]
    assert found.value == packaged_factors().overhead(async_scheduling=True).top_k_passes
    assert found.low == 0
    assert found.high > 2 * found.value


def test_of_two_overheads_that_always_occur_together_only_the_sum_is_known(runs: list[MeasuredRun]) -> None:
    filtered = [run for run in runs if run.model.startswith(("llama", "qwen"))]
    found = fit(filtered).overheads[ASYNCHRONOUS]
    together = TRUTH["per_iteration_s"] + TRUTH["filter_fixed_s"]
    assert found["per_iteration_s"].value + found["filter_fixed_s"].value == pytest.approx(together, rel=0.2)
    for name in ("per_iteration_s", "filter_fixed_s"):
        assert found[name].low == 0
        assert found[name].high > together


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(4)
    covered = dict.fromkeys(TRUTH, 0)
    repeats = 40
    for _ in range(repeats):
        truth = TRUTH | {name: max(0.0, rng.normal(1, PRIOR_SPREAD[name])) for name in CORRECTIONS}
        made_up = with_noise([by_linear_model(load, truth) for load in loads()], NOISE, rng)
        for name, estimate in estimates(fit(made_up, resamples=40)).items():
            covered[name] += estimate.low <= truth[name] <= estimate.high
    assert min(covered.values()) >= 0.8 * repeats, covered


# ----------------------------------------------------------------------------------------- what is in the fit


def test_an_experiment_left_out_does_not_matter(runs: list[MeasuredRun]) -> None:
    left_out = runs[0].exp
    spoiled = [replace(run, tpot_mean_s=3 * run.tpot_mean_s) if run.exp == left_out else run for run in runs]
    without = fit(spoiled, without=(left_out,), resamples=0)
    assert without.parameters().tolist() == fit(runs, without=(left_out,), resamples=0).parameters().tolist()
    assert without.parameters().tolist() != fit(spoiled, resamples=0).parameters().tolist()
    assert left_out not in without.experiments
    assert without.left_out == {}
    assert without.engine_of(runs[0]).label == f"fit without {left_out}"
    assert leave_one_out(spoiled)(left_out).parameters().tolist() == without.parameters().tolist()


def test_held_out_errors_are_of_fits_without_the_unit(runs: list[MeasuredRun]) -> None:
    noisy = with_noise(runs, 0.02, np.random.default_rng(5))
    errors = {seen.run.run_id: error for seen, error in held_out_errors(noisy, ASYNCHRONOUS)}
    assert len(errors) == len(runs)
    without = fit(noisy, without=(noisy[0].exp,), resamples=0)
    seen = observe(noisy[0])
    assert not isinstance(seen, str)
    expected = float(seen.terms @ without.parameters() / seen.measured_s - 1)
    assert errors[noisy[0].run_id] == pytest.approx(expected)
    by_gpu = held_out_errors(noisy, ASYNCHRONOUS, lambda run: run.gpu)
    others = fit([run for run in noisy if run.gpu != "L40S"], resamples=0)
    found = next(error for seen, error in by_gpu if seen.run.gpu == "L40S")
    first = next(observe(run) for run in noisy if run.gpu == "L40S")
    assert not isinstance(first, str)
    assert found == pytest.approx(float(first.terms @ others.parameters() / first.measured_s - 1))


def test_a_unit_that_is_all_there_is_has_no_held_out_error(runs: list[MeasuredRun]) -> None:
    assert held_out_errors(runs[:3], ASYNCHRONOUS) == []


def test_errors_grow_beyond_the_fitted_batches_where_the_model_is_wrong_there(runs: list[MeasuredRun]) -> None:
    noisy = with_noise(runs, 0.01, np.random.default_rng(7))
    bent = [
        replace(run, tpot_mean_s=1.3 * run.tpot_mean_s, rate_rps=run.rate_rps / 1.3) if run.stage == 2 else run
        for run in noisy
    ]
    straight_growth, bent_growth = (error_growth(each, ASYNCHRONOUS) for each in (noisy, bent))
    assert 0 <= straight_growth < bent_growth
    assert isnan(error_growth(runs[:3], ASYNCHRONOUS))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"flag": "overloaded"}, "flagged"),
        ({"arch": "moe"}, "a mixture of experts"),
        ({"engine": "SGLang"}, "an engine other than vLLM"),
        ({"dp": 2}, "data parallel, several engines in one row"),
        ({"load_type": "burst"}, "no mean time per output token in an open loop, and no median gap in a saturated one"),
        ({"model": "lama-3.1-8b"}, "unknown model 'lama-3.1-8b', did you mean 'llama-3.1-8b'?"),
    ],
)
def test_what_cannot_be_fitted_is_left_out_and_counted(
    runs: list[MeasuredRun], changes: dict[str, object], reason: str
) -> None:
    spoiled = [replace(run, **changes) for run in runs[:2]]  # type: ignore[arg-type]
    found = fit([*spoiled, *runs[2:]], resamples=0)
    assert found.left_out == {reason: 2}
    assert len(found.observations) == len(runs) - 2
    assert found.parameters().tolist() == fit(runs[2:], resamples=0).parameters().tolist()


def test_nothing_left_to_fit_to_says_why(runs: list[MeasuredRun]) -> None:
    with pytest.raises(ValueError, match=r"no measured run is left to fit to; left out: \{'flagged': 1\}"):
        fit([replace(runs[0], flag="overloaded")])


def test_is_deterministic_and_the_order_of_runs_does_not_matter(runs: list[MeasuredRun]) -> None:
    noisy = with_noise(runs, 0.02, np.random.default_rng(6))
    found = estimates(fit(noisy))
    assert estimates(fit(noisy)) == found
    backwards = estimates(fit(noisy[::-1]))
    for name, estimate in found.items():
        assert backwards[name].value == pytest.approx(estimate.value, rel=1e-6, abs=1e-9)
        assert backwards[name].high == pytest.approx(estimate.high, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("0.15.1 (a fork)", ASYNCHRONOUS),
        ("vLLM 0.15.1", ASYNCHRONOUS),
        ("0.14.0", ASYNCHRONOUS),
        ("1.0", ASYNCHRONOUS),
        ("0.13.2", SYNCHRONOUS),
        ("not said", SYNCHRONOUS),
    ],
)
def test_scheduling_is_asynchronous_since_0_14(text: str, group: object) -> None:
    assert group_of_version(text) is group


# ---------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gpu": "H100-SMX"}, "unknown GPU 'H100-SMX', did you mean 'H100-SXM'?"),
        ({"model": "llama-3.1-9b"}, "unknown model 'llama-3.1-9b', did you mean 'llama-3.1-8b'?"),
        ({"quantization": "fp9"}, "unknown quantization 'fp9', did you mean 'fp8'?"),
        ({"engine_version": "0.9.0"}, "no run of vLLM before 0.14 .* was measured; known are: vLLM 0.14 and later"),
        ({"engine_version": "0.6.0"}, "no run of vLLM before 0.8 .* was measured; known are: vLLM 0.14 and later"),
    ],
)
def test_an_unknown_engine_fails_with_what_is_known(
    calibration: Calibration, runs: list[MeasuredRun], changes: dict[str, object], text: str
) -> None:
    with pytest.raises(CannotPredictError, match=text.replace("?", r"\?")):
        calibration.engine_of(replace(runs[0], **changes))  # type: ignore[arg-type]


works = st.tuples(
    st.integers(0, 4096),
    st.integers(0, 64),
    st.floats(0, 1e8),
    st.integers(0, 500_000),
    st.integers(0, 1024),
    st.integers(0, 2_000_000),
)


@given(works, st.integers(0, 5), st.sampled_from(ENGINES), st.integers(1, 5000))
def test_curves_never_fall_when_any_part_of_the_work_grows(
    calibration: Calibration,
    work: tuple[int, int, float, int, int, int],
    field: int,
    engine: tuple[str, str, int],
    more: int,
) -> None:
    model, gpu, size = engine
    curve = calibration.engine_of(replace(loads()[0][0], model=model, gpu=gpu, tp=size)).curve
    grown = [part + more * (number == field) for number, part in enumerate(work)]
    assert curve.iteration_s(IterationWork(*grown)) >= curve.iteration_s(IterationWork(*work)) > 0  # type: ignore[arg-type]


def test_every_parameter_is_in_an_observation(runs: list[MeasuredRun]) -> None:
    assert list(TRUTH) == [*CORRECTIONS, *OVERHEADS]
    seen = [found.terms for found in map(observe, runs) if not isinstance(found, str)]
    assert (np.sum(seen, axis=0)[: len(TRUTH)] > 0).all()
