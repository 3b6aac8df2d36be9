from dataclasses import replace

import numpy as np
import pytest

from calibrate.check.pace import paces
from calibrate.measure.iteration_records import SentRequest
from real.experts.iteration_log import IterationLine
from sim.records import COMPLETED, RunRecord
from sim.service_curve import CurveSource, DecodePiece, IterationWork
from tests.iteration_runs import SETTINGS, run_engine, seconds
from tests.run_records import make_fleet, make_requests, make_run


class TrueCurve:
    """The curve that the engine of tests.iteration_runs has."""

    source = CurveSource(label="truth", detail="")

    def iteration_s(self, work: IterationWork) -> float:
        return seconds(work)

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        raise AssertionError("iterations are looked at one by one")


FLEET = make_fleet("one", experts=1)
EXPERT = replace(FLEET.experts[0], engine=SETTINGS, curve=TrueCurve())


def run_at(
    load: float, began_s: float, slowness: float, coming_s: float = 0.0
) -> tuple[RunRecord, list[IterationLine]]:
    """A run on an engine that is so many times slower than its curve, and from which requests take time besides."""
    rng = np.random.default_rng(int(load))
    asked = [
        SentRequest(
            point="run",
            number=number,
            prompt_tokens=int(rng.integers(20, 200)),
            output_tokens=int(rng.integers(5, 60)),
            sent_s=began_s + 0.05 * number,
        )
        for number in range(40)
    ]
    lines, seen = run_engine(asked, time_of=lambda work: slowness * seconds(work), coming_s=coming_s)
    columns = {
        "request_id": [each.number for each in seen],
        "prompt_tokens": [each.prompt_tokens for each in seen],
        "output_tokens": [each.output_tokens for each in seen],
        "sent_s": [each.sent_s - began_s for each in seen],
        "first_token_s": [each.first_token_s - began_s for each in seen],
        "last_token_s": [each.last_token_s - began_s for each in seen],
        "status": COMPLETED,
    }
    run = replace(make_run(FLEET, load), requests=make_requests(40, **columns), began_monotonic_s=began_s)
    return replace(run, window_s=(0.0, lines[-1].ended_s - began_s)), lines


def test_pace_is_how_much_slower_an_engine_was_than_its_curve() -> None:
    first, first_lines = run_at(8, 100.0, 1.1)
    again, again_lines = run_at(8, 200.0, 1.3)
    other, other_lines = run_at(32, 300.0, 0.9)
    found = paces([EXPERT], [other, first, again], {(0, 0): [*first_lines, *again_lines, *other_lines]})
    assert [(pace.load, pace.expert) for pace in found] == [(8, "expert-0"), (32, "expert-0")]
    assert (found[0].low, found[0].high) == pytest.approx((1.1, 1.3))
    assert 1.1 < found[0].pace < 1.3
    assert found[1].pace == pytest.approx(0.9)
    assert all(pace.known > 0.9 for pace in found)


def test_what_other_requests_than_the_runs_own_did_is_not_taken_for_its_pace() -> None:
    run, lines = run_at(8, 100.0, 1.0)
    wrong = dict(run.requests)
    wrong["prompt_tokens"] = wrong["prompt_tokens"] + 7
    assert paces([EXPERT], [replace(run, requests=wrong)], {(0, 0): lines}) == []


def test_an_engine_that_is_measured_again_after_a_run_does_not_change_the_runs_pace() -> None:
    run, lines = run_at(8, 100.0, 1.1)
    _, measured = run_at(8, lines[-1].ended_s + 0.5, 5.0)
    assert paces([EXPERT], [run], {(0, 0): [*lines, *measured]}) == paces([EXPERT], [run], {(0, 0): lines})


def test_what_requests_take_from_an_engine_is_not_its_pace() -> None:
    run, lines = run_at(8, 100.0, 1.1, coming_s=0.01)
    (unaware,) = paces([EXPERT], [run], {(0, 0): lines})
    assert unaware.pace > 1.12
    front_end = replace(EXPERT.front_end, per_request_engine_s=0.01)
    (aware,) = paces([replace(EXPERT, front_end=front_end)], [run], {(0, 0): lines})
    assert aware.pace == pytest.approx(1.1, abs=0.005)


def test_a_replica_without_a_log_has_no_pace() -> None:
    run, _ = run_at(8, 100.0, 1.0)
    assert paces([EXPERT], [run], {(0, 0): []}) == []
