"""Under live arrivals the right scheduler's batches agree, a wrong one's do not, whatever the clock."""

from dataclasses import replace

import numpy as np
import pytest

from calibrate.measure.engine_entry import EntrySample, fit_entry
from calibrate.measure.iteration_records import SentRequest, admissions
from calibrate.measure.live_batches import compare_live
from real.experts.iteration_log import IterationLine
from sim.fleet import EngineSettings
from sim.service_curve import IterationWork
from sim.streams import stream
from tests.iteration_runs import SETTINGS, run_engine, seconds

FEW_SEQS = replace(SETTINGS, max_num_seqs=6)


def arrivals(count: int, gap_s: float) -> list[SentRequest]:
    rng = stream(3, "arrivals")
    times_s = np.cumsum(rng.exponential(gap_s, count))
    return [
        SentRequest(
            point="live",
            number=number,
            prompt_tokens=int(rng.integers(10, 400)),
            output_tokens=int(rng.integers(2, 60)),
            sent_s=float(time_s),
        )
        for number, time_s in enumerate(times_s)
    ]


def served(
    settings: EngineSettings, *, lag_s: float = 0.012, lag_jitter_s: float = 0.0, gap_s: float = 0.06
) -> tuple[list[IterationLine], list[SentRequest]]:
    rng = stream(4, "noise")
    lags = lag_s + lag_jitter_s * rng.uniform(-1, 1, 200)

    def time_of(work: IterationWork) -> float:
        return seconds(work) * float(rng.uniform(0.7, 1.5))

    return run_engine(arrivals(200, gap_s), settings, time_of=time_of, entry_s=lambda number: float(lags[number]))


@pytest.mark.parametrize(
    "settings", [SETTINGS, FEW_SEQS, replace(SETTINGS, async_scheduling=True)], ids=["many", "few", "asynchronous"]
)
def test_batches_agree_by_the_clock_of_a_noisy_engine(settings: EngineSettings) -> None:
    found = compare_live(*served(settings), settings)
    assert found.within_jitter == 1.0
    assert found.exact > 0.7  # where every slot is taken, one early entry moves all that follow by an iteration
    assert found.admitted_near > 0.99
    assert found.entry.delay_s + found.entry.per_request_s == pytest.approx(0.012, abs=0.005)
    assert found.batch_simulated == pytest.approx(found.batch_real, rel=0.01)


def test_arrivals_that_jitter_by_an_iteration_still_agree_within_jitter() -> None:
    found = compare_live(*served(SETTINGS, lag_jitter_s=0.0025), SETTINGS)
    assert found.exact < found.within_jitter
    assert found.within_jitter > 0.95


@pytest.mark.parametrize(
    "wrong", [replace(FEW_SEQS, max_num_seqs=8), replace(FEW_SEQS, max_num_batched_tokens=256)], ids=["seqs", "budget"]
)
def test_a_wrong_scheduler_is_found_out(wrong: EngineSettings) -> None:
    found = compare_live(*served(FEW_SEQS), wrong)
    assert found.within_jitter < 0.9
    assert found.first_difference is not None
    assert "real" in found.first_difference


def test_nothing_to_compare_is_told() -> None:
    with pytest.raises(ValueError, match="at least one iteration and one request"):
        compare_live([], [], SETTINGS)


def test_the_work_on_simultaneous_requests_is_seen_in_their_entries() -> None:
    samples = []
    for number, count in enumerate([8, 16, 30]):
        sent = [
            SentRequest(point="p", number=n, prompt_tokens=16, output_tokens=24, sent_s=0.5 * number)
            for n in range(count)
        ]
        lines, seen = run_engine(sent, entry_s=lambda n: 0.004 * (n + 1) + 0.003)
        samples.append(
            EntrySample(lines=lines, sent=seen, admitted=admissions(lines, seen, SETTINGS), settings=SETTINGS)
        )
    entry = fit_entry(samples)
    assert entry.agreeing == 1.0
    assert entry.per_request_s == pytest.approx(0.004, rel=0.25)
    assert entry.delay_s == pytest.approx(0.003, abs=0.006)
