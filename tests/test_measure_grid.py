"""The next point is the one that narrows most a second, and what a point tells is what it later shows."""

import numpy as np
import pytest

from calibrate.measure.grid import (
    Choice,
    Point,
    candidate,
    candidates,
    closed_points,
    first_design,
    idle_points,
    lengths_of,
    target_works,
)
from calibrate.measure.iteration_records import reconstruct
from sim.spec import ClassSpec, ClosedLoop, Fixed, WorkloadSpec
from sim.traffic import WorkloadData
from tests.iteration_runs import SETTINGS, TRUTH, requests_of, run_engine

LENGTHS = lengths_of(None, WorkloadData(), SETTINGS.max_model_len)


def choice() -> Choice:
    return Choice(TRUTH, target_works(SETTINGS, LENGTHS), 1e-3)


def after(*points: Point) -> Choice:
    chosen = choice()
    for point in points:
        chosen.learn(candidate(point, SETTINGS))
    return chosen


SMALL = Point(kind="steps", requests=1, prompt_tokens=16, output_tokens=24)
LARGE = Point(kind="steps", requests=32, prompt_tokens=16, output_tokens=24)
MIXED = Point(kind="steps", requests=4, prompt_tokens=16, output_tokens=40, late=3, late_tokens=256)


def test_every_measurement_narrows_and_a_different_one_narrows_more_than_a_repeat() -> None:
    assert choice().spread > after(SMALL).spread > after(SMALL, SMALL).spread
    assert after(SMALL, MIXED).spread < after(SMALL, SMALL).spread


def test_prompts_are_chosen_where_only_decodes_were_measured() -> None:
    best = after(SMALL, LARGE, SMALL, LARGE).best(candidates(SETTINGS, LENGTHS), 100.0)
    assert best is not None
    assert best.point.late


def test_large_batches_are_chosen_where_only_small_ones_were_measured() -> None:
    few = [
        Point(kind="steps", requests=1, prompt_tokens=16, output_tokens=30, late=3, late_tokens=n) for n in (8, 64, 400)
    ]
    chosen = after(*few * 3)
    first_ten = []
    for _ in range(10):
        best = chosen.best(candidates(SETTINGS, LENGTHS), 100.0)
        assert best is not None
        chosen.learn(best)
        first_ten.append(best.point.requests)
    assert max(first_ten) >= 16


def test_what_does_not_fit_the_time_left_is_not_chosen() -> None:
    assert choice().best(candidates(SETTINGS, LENGTHS), 0.1) is None
    best = choice().best(candidates(SETTINGS, LENGTHS), 1.0)
    assert best is not None
    assert best.seconds(TRUTH) <= 1.0


def test_a_candidate_foresees_what_the_point_will_show() -> None:
    foreseen = candidate(MIXED, SETTINGS)
    lines, seen = run_engine(requests_of(MIXED, "p"))
    shown = reconstruct(lines, seen, SETTINGS, "p")
    assert foreseen.works[foreseen.tells, 0].sum() == shown["prefill_tokens"][1:].sum()
    assert foreseen.works[:, 4].max() == shown["decodes"].max()
    assert foreseen.iterations.sum() == pytest.approx(len(lines), abs=6)
    assert foreseen.seconds(TRUTH) == pytest.approx(lines[-1].ended_s, rel=0.5)


def test_candidates_fit_the_engine() -> None:
    for each in candidates(SETTINGS, LENGTHS):
        assert each.point.requests + (each.point.late > 0) <= SETTINGS.max_num_seqs
        assert each.point.prompt_tokens + each.point.output_tokens <= SETTINGS.max_model_len
        assert (
            each.works[:, 0].max() + each.works[:, 4].max() <= SETTINGS.max_num_batched_tokens + SETTINGS.max_num_seqs
        )
    names = [each.point.name for each in candidates(SETTINGS, LENGTHS)]
    assert len(set(names)) == len(names)


def test_the_first_design_has_small_large_mixed_and_idle_points() -> None:
    points = first_design(SETTINGS, LENGTHS)
    assert {point.requests for point in points if point.kind == "steps"} >= {1, 32}
    assert any(point.late for point in points)
    told = [candidate(point, SETTINGS) for point in points if point.kind == "steps"]
    assert max(each.works[:, 0].max() for each in told) == SETTINGS.max_num_batched_tokens
    assert max(each.works[:, 5].max() for each in told) > 1000
    assert [point for point in points if point.kind == "idle"] == idle_points(LENGTHS)
    assert closed_points(SETTINGS, LENGTHS)[-1].users == 32


def test_lengths_are_those_of_the_workload_by_share() -> None:
    classes = {
        "a": ClassSpec(share=3, prompt_tokens=Fixed(value=100), output_tokens=Fixed(value=10)),
        "b": ClassSpec(share=1, prompt_tokens=Fixed(value=900), output_tokens=Fixed(value=300)),
    }
    lengths = lengths_of(WorkloadSpec(classes=classes, load=ClosedLoop(users=1)), WorkloadData(), 1000)
    assert np.mean(lengths.prompts == 100) == 0.75
    assert lengths.longest_context == 1000  # cut to what the model takes
