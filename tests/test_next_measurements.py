from dataclasses import replace

import numpy as np
import pytest

from calibrate.fit.experts import ExpertKey
from calibrate.fit.fit import NOISE, Calibration, fit
from calibrate.fit.next_measurements import BATCHES, candidate_points, knowledge, narrowings, suggest
from calibrate.fit.parameters import ASYNCHRONOUS, SYNCHRONOUS
from calibrate.predictor import CannotPredictError
from tests.synthetic_runs import TRUTH, VERSION, by_linear_model, loads, with_noise

EXPERTS: list[ExpertKey] = [
    (model, "bf16", gpu, size)
    for model in ("llama-3.1-8b", "codellama-34b", "qwen3-14b")
    for gpu in ("H100-SXM", "A100-80GB")
    for size in (1, 2, 4)
]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Of engines on one GPU only, so that all-reduces are hardly known."""
    engines = [("llama-3.1-8b", "H100-SXM", 1), ("qwen3-14b", "H100-SXM", 1), ("codellama-34b", "H100-SXM", 2)]
    return fit(with_noise([by_linear_model(load) for load in loads(engines)], 0.01, np.random.default_rng(1)))


@pytest.mark.parametrize("parameter", ["all_reduce", "per_sequence_s", "matrix"])
def test_the_suggested_point_narrows_most_when_it_is_added(calibration: Calibration, parameter: str) -> None:
    """By adding every candidate to the fit in turn, at the time the fit predicts for it."""
    points = candidate_points(EXPERTS, VERSION)
    before = next(each.spread for each in knowledge(calibration, ASYNCHRONOUS) if each.name == parameter)
    shares = []
    for point in points:
        predicted_s = float(point.terms @ calibration.parameters())
        added = replace(
            calibration,
            observations=(*calibration.observations, replace(point, measured_s=predicted_s)),
            errors=np.append(calibration.errors, 0.0),
        )
        after = next(each.spread for each in knowledge(added, ASYNCHRONOUS) if each.name == parameter)
        shares.append(1 - after / before)
    assert narrowings(calibration, ASYNCHRONOUS, parameter, points) == pytest.approx(shares, rel=1e-4, abs=1e-9)
    best = points[int(np.argmax(shares))]
    first = suggest(calibration, ASYNCHRONOUS, parameter, points)[0]
    assert (*first.expert, first.batch) == (best.run.model, "bf16", best.run.gpu, best.run.tp, best.decodes)
    assert first.narrowing == pytest.approx(max(shares), rel=1e-4)


def test_a_measurement_at_the_suggested_point_narrows_a_new_fit(calibration: Calibration) -> None:
    points = candidate_points(EXPERTS, VERSION)
    first = suggest(calibration, ASYNCHRONOUS, "all_reduce", points)[0]
    model, _, gpu, size = first.expert
    named = (model, gpu, size, first.batch)
    point = next(p for p in points if (p.run.model, p.run.gpu, p.run.tp, p.decodes) == named)
    measured_s = float(point.terms @ calibration.parameters())
    runs = [seen.run for seen in calibration.observations]
    again = fit([*runs, replace(point.run, itl_p50_s=measured_s)], resamples=0)
    spreads = [
        next(each.spread for each in knowledge(each_fit, ASYNCHRONOUS) if each.name == "all_reduce")
        for each_fit in (calibration, again)
    ]
    assert first.narrowing > 0.15
    assert 1 - spreads[1] / spreads[0] == pytest.approx(first.narrowing, abs=0.05)


def test_suggests_the_best_batch_of_each_expert_once_and_the_best_first(calibration: Calibration) -> None:
    points = candidate_points(EXPERTS, VERSION)
    found = suggest(calibration, ASYNCHRONOUS, "all_reduce", points, count=4)
    assert len({each.expert for each in found}) == 4
    assert [each.narrowing for each in found] == sorted((each.narrowing for each in found), reverse=True)
    assert all(each.expert[3] > 1 for each in found)
    assert suggest(calibration, ASYNCHRONOUS, "all_reduce", []) == []


def test_other_engine_versions_tell_less_of_an_overhead(calibration: Calibration) -> None:
    """Something still, through the corrections that all versions share."""
    experts: list[ExpertKey] = [("qwen3-14b", "bf16", "H100-SXM", 1)]
    same, other = (
        narrowings(calibration, ASYNCHRONOUS, "top_k_passes", candidate_points(experts, version)).max()
        for version in (VERSION, "0.6.0")
    )
    assert 0 < other < same / 2


def test_shares_of_an_iteration_add_up_and_the_worst_known_comes_first(calibration: Calibration) -> None:
    known = knowledge(calibration, ASYNCHRONOUS)
    assert {each.name for each in known} == set(TRUTH)
    assert sum(each.share for each in known) == pytest.approx(1, abs=2 * NOISE)
    assert [each.felt for each in known] == sorted((each.felt for each in known), reverse=True)
    by_name = {each.name: each for each in known}
    assert by_name["matrix"].share > 0.5
    assert by_name["matrix"].estimate == calibration.corrections["matrix"]


def test_a_parameter_that_nobody_feels_comes_last() -> None:
    engines = [("llama-3.1-8b", gpu, 1) for gpu in ("H100-SXM", "A100-80GB")]
    known = knowledge(fit([by_linear_model(load) for load in loads(engines)]), ASYNCHRONOUS)
    unseen = {each.name: each for each in known[-2:]}
    assert set(unseen) == {"all_reduce", "top_k_passes"}
    assert all(each.share == each.felt == 0 for each in unseen.values())
    assert all(each.spread > 0 for each in unseen.values())


def test_a_group_that_was_not_measured_has_no_parameters(calibration: Calibration) -> None:
    with pytest.raises(CannotPredictError, match=r"known are: vLLM 0\.14 and later"):
        knowledge(calibration, SYNCHRONOUS)


def test_candidates_are_what_fits_the_gpus_and_each_shape_once() -> None:
    batches = {p.decodes for p in candidate_points([("llama-2-7b", "bf16", "H100-SXM", 1)], VERSION)}
    assert batches == {1, 8, 32, 64}  # of 0.5 MB of KV per token and 1,800 tokens each, 128 are beyond 80 GB
    assert max(batches) < max(BATCHES)
    assert candidate_points([("llama-3.1-70b", "bf16", "H100-SXM", 1)], VERSION) == []
    both = candidate_points([(f"llama-3{dot}-8b", "bf16", "H100-SXM", 1) for dot in ("", ".1")], VERSION)
    assert {point.run.model for point in both} == {"llama-3-8b"}
