"""A fit finds the terms that iterations were made with, through noise, jitter of log lines, and stalls."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from calibrate.fit.iteration_fit import TERMS, TermFit, fit_best, fit_terms, held_out_errors, term_parameters
from calibrate.fit.iteration_observations import Observations, TooFewRecordsError, observations
from calibrate.measure.grid import candidates, lengths_of
from calibrate.measure.iteration_records import reconstruct
from sim.service_curve import IterationWork
from sim.streams import stream
from sim.traffic import WorkloadData
from tests.iteration_runs import SETTINGS, TRUTH, requests_of, run_engine, seconds


def measured(truth: TermFit = TRUTH, *, noise: float = 0.0, jitter_s: float = 0.0, stalls: float = 0.0) -> pd.DataFrame:
    """Records of every sixth candidate point, each with its own bit of luck."""
    points = [each.point for each in candidates(SETTINGS, lengths_of(None, WorkloadData(), 2048))][::6]
    frames = []
    for number, point in enumerate(points):
        rng = stream(7, "noise", number)
        luck = 1 + noise * rng.standard_normal()

        def time_of(work: IterationWork, luck: float = luck, rng: np.random.Generator = rng) -> float:
            stall = 5.0 if rng.uniform() < stalls else 1.0
            return seconds(work, truth) * luck * stall * (1 + noise * rng.standard_normal())

        label = f"{point.name}#1"
        lines, seen = run_engine(requests_of(point, label), time_of=time_of)
        lines = [line._replace(ended_s=line.ended_s + jitter_s * rng.exponential()) for line in lines]
        frames.append(reconstruct(lines, seen, SETTINGS, label))
    return pd.concat(frames, ignore_index=True)


def predictions(fit: TermFit) -> np.ndarray:
    works = [
        IterationWork(0, 0, 0.0, 0, 1, 200),
        IterationWork(0, 0, 0.0, 0, 8, 3000),
        IterationWork(0, 0, 0.0, 0, 32, 20_000),
        IterationWork(300, 1, 45_150.0, 300, 4, 800),
        IterationWork(480, 3, 60_000.0, 900, 32, 9000),
    ]
    return fit.predict_s(np.array(works, dtype=np.float64))


def test_terms_are_found_exactly_without_noise() -> None:
    fit = fit_terms(observations(measured()))
    assert fit.floor_tokens == TRUTH.floor_tokens
    assert fit.terms == pytest.approx(TRUTH.terms, rel=1e-3, abs=1e-9)


def test_predictions_survive_noise_jitter_and_stalls() -> None:
    seen = observations(measured(noise=0.02, jitter_s=0.003, stalls=0.02))
    assert seen.jitter_s == pytest.approx(0.003, rel=0.5)
    errors = predictions(fit_terms(seen)) / predictions(TRUTH) - 1
    assert np.abs(errors).max() < 0.05


def test_a_fit_predicts_the_mean_of_skewed_times_and_no_stalls() -> None:
    seen = observations(measured())
    rng = stream(3, "skew")
    slow = np.where(rng.uniform(size=len(seen.measured_s)) < 0.2, 1.3, 1.0)
    stalled = rng.uniform(size=len(slow)) < 0.03
    skewed = replace(seen, measured_s=seen.measured_s * np.where(stalled, 6.0, slow))
    took_s = float((skewed.measured_s * seen.iterations)[~stalled].sum())

    def together(fit: TermFit) -> float:
        return float((fit.predict_s(seen.works) * seen.iterations)[~stalled].sum()) / took_s

    assert together(fit_terms(skewed)) < 0.97, "Huber weights are of the middle"
    assert together(fit_best(skewed)) == pytest.approx(1.0, abs=0.005)


def test_a_floor_of_the_matrix_work_is_told_from_a_constant() -> None:
    truth = replace(TRUTH, floor_tokens=64, terms={**TRUTH.terms, "per_iteration": 1e-3, "per_decode": 1e-5})
    fit = fit_terms(observations(measured(truth)))
    assert fit.weights_s == pytest.approx(64 * 4e-4, rel=0.02)
    assert fit.terms["per_iteration"] == pytest.approx(1e-3, rel=0.1)


def test_intervals_hold_the_truth_and_hold_out_tells_the_noise() -> None:
    seen = observations(measured(noise=0.02))
    fitted, parameters = term_parameters(seen, resamples=60)
    assert not fitted.knots
    inside = 0
    for name in TERMS:
        found = getattr(parameters, name)
        inside += found.low <= TRUTH.terms[name] <= found.high
    assert inside >= 5
    assert parameters.weights.value == pytest.approx(fitted.weights_s, rel=1e-3)
    errors = held_out_errors(seen, fitted)
    assert 0.005 < np.median(np.abs(errors)) < 0.03


def test_padded_batches_take_the_time_of_the_captured_size() -> None:
    padded = replace(TRUTH, graph_sizes=(1, 2, 4, 8, 16, 32), floor_tokens=0)
    fit = fit_terms(observations(measured(padded)), graph_sizes=padded.graph_sizes)
    assert predictions(fit) == pytest.approx(predictions(padded), rel=1e-3)


def test_matrix_work_that_bends_is_followed_by_knots() -> None:
    bent = replace(TRUTH, floor_tokens=0, knots=((4, 6e-3), (16, 8e-3), (64, 30e-3)))
    seen = observations(measured(bent, noise=0.01))
    fitted, parameters = term_parameters(seen, resamples=10)
    assert fitted.knots
    errors = predictions(fitted) / predictions(bent) - 1
    assert np.abs(errors).max() < 0.04
    assert np.median(np.abs(held_out_errors(seen, fitted))) < 0.02
    heights = [knot.seconds.value for knot in parameters.matrix_knots]
    assert heights == sorted(heights)


def test_iterations_that_are_not_understood_are_left_out() -> None:
    records = measured()
    whole = observations(records)
    records.loc[records["point"] == records["point"][0], "matched"] = False
    assert len(observations(records).measured_s) < len(whole.measured_s)


def test_too_few_records_are_told() -> None:
    with pytest.raises(TooFewRecordsError, match=r"5 iteration records give \d observations, a fit needs 8"):
        observations(measured().head(5))


def test_observations_are_means_of_like_iterations() -> None:
    seen = observations(measured())
    assert isinstance(seen, Observations)
    decode_only = seen.works[:, 0] == 0
    assert (seen.iterations[~decode_only] == 1).all()
    assert seen.iterations[decode_only].max() == 16
