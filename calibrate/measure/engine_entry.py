"""When requests enter the engine: what a front end takes with each, worked out from sending times and the log.

A request admitted in iteration ``k`` was let in after the batch before was decided and before this one was, unless it
had to wait for room. The front end works on requests one after another, so their entries follow from the work each
takes and a delay; both are the pair that agrees with most requests. Where front end and engine share a core, that is
more than the CPU time of the work, and it is what users meet.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.measure.iteration_records import SentRequest
from real.experts.iteration_log import IterationLine
from sim.fleet import EngineSettings

WORKS_S = (0.0, *(float(f"{value:.3g}") for value in np.geomspace(2e-4, 5e-2, 49)))
"""Seconds of work a request, to choose from."""
PAUSE_S = 1e-3
"""What an asynchronous engine that waits for its next batch later than this after the last had none in between."""
NEARLY = 0.01
"""Share of the requests by which agreements are taken as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """How a front end lets requests in.

    Attributes:
        per_request_s: work on each, one after another.
        delay_s: after that.
        agreeing: share of the usable requests that really entered so.
        usable: how many did not have to wait for room.
    """

    per_request_s: float
    delay_s: float
    agreeing: float
    usable: int

    def entries_s(self, requests: Sequence[SentRequest]) -> NDArray[np.float64]:
        """Return when each request enters; they are in the order of sending."""
        return done_s(requests, self.per_request_s) + self.delay_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EntrySample:
    """Requests of one point, in order of sending, and the iteration that admitted each (None: not known)."""

    lines: Sequence[IterationLine]
    sent: Sequence[SentRequest]
    admitted: Sequence[int | None]
    settings: EngineSettings


def done_s(requests: Sequence[SentRequest], work_s: float) -> NDArray[np.float64]:
    """Return when a process that works on one request after another is done with each."""
    sent_s = np.array([request.sent_s for request in requests])
    places = work_s * np.arange(1, len(sent_s) + 1)
    return np.asarray(np.maximum.accumulate(sent_s + work_s - places) + places)


def decision_times(lines: Sequence[IterationLine], settings: EngineSettings) -> list[float]:
    """Return when each batch was decided: at the end of the one before, or after a pause when the model began.

    With asynchronous scheduling that is one batch earlier: the decision follows the end of the one before the last.
    """
    starts_s: list[float] = []
    for number, line in enumerate(lines):
        began_s = line.ended_s - line.elapsed_s
        if not number or (settings.async_scheduling and _after_a_pause(lines, number)):
            starts_s.append(began_s)
        elif settings.async_scheduling:
            earlier_s = lines[number - 2].ended_s if number > 1 else starts_s[-1]
            starts_s.append(max(earlier_s, starts_s[-1]))
        else:
            starts_s.append(max(lines[number - 1].ended_s, min(began_s, line.ended_s)))
    return starts_s


def _after_a_pause(lines: Sequence[IterationLine], number: int) -> bool:
    """Whether an asynchronous engine was idle before a batch: nobody has output, and the wait for it began late."""
    line = lines[number]
    return not line.generation_requests and line.ended_s - line.elapsed_s - lines[number - 1].ended_s > PAUSE_S


def fit_entry(samples: Iterable[EntrySample], works_s: Sequence[float] = WORKS_S) -> Entry:
    """Return the work and delay that most requests agree with."""
    windows = [(sample.sent, *_windows(sample)) for sample in samples]
    usable = sum(int(np.isfinite(latest_s).sum()) for _, _, latest_s in windows)
    found: list[tuple[int, float, float]] = []
    for work_s in works_s:
        windows_s = [
            np.column_stack([early - done, late - done])[np.isfinite(late)]
            for sent, early, late in windows
            for done in [done_s(sent, work_s)]
        ]
        earliest_s, latest_s = np.concatenate([*windows_s, np.empty((0, 2))]).T
        inside, delay_s = _most_covered(earliest_s, latest_s)
        found.append((inside, work_s, delay_s))
    most = max(inside for inside, _, _ in found)
    good = [each for each in found if each[0] >= most - NEARLY * usable]
    # No work at all where that explains the entries as well: then requests came too far apart to tell.
    inside, work_s, delay_s = good[0] if good[0][1] == 0 else good[len(good) // 2]
    agreeing = inside / usable if usable else 0.0
    return Entry(per_request_s=work_s, delay_s=delay_s, agreeing=agreeing, usable=usable)


def _windows(sample: EntrySample) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Between which times each request entered; NaN where it may have waited for room, or is not known."""
    starts_s = decision_times(sample.lines, sample.settings)
    limits = sample.settings
    full = [
        line.context_tokens + line.generation_tokens >= limits.max_num_batched_tokens
        or line.context_requests + line.generation_requests >= limits.max_num_seqs
        for line in sample.lines
    ]
    earliest_s = np.full(len(sample.sent), np.nan)
    latest_s = np.full(len(sample.sent), np.nan)
    for place, (request, number) in enumerate(zip(sample.sent, sample.admitted, strict=True)):
        if number is None or (number and full[number - 1]) or starts_s[number] < request.sent_s:
            continue
        previous = bisect_left(starts_s, starts_s[number]) - 1
        earliest_s[place] = max(request.sent_s, starts_s[previous] if previous >= 0 else request.sent_s)
        latest_s[place] = starts_s[number]
    return earliest_s, latest_s


def _most_covered(earliest_s: NDArray[np.float64], latest_s: NDArray[np.float64]) -> tuple[int, float]:
    """Return in how many intervals a non-negative delay can lie at once, and the middle of where it does."""
    edges = sorted(
        [(max(0.0, float(place)), 0) for place, end in zip(earliest_s, latest_s, strict=True) if end >= 0]
        + [(float(place), 1) for place in latest_s if place >= 0]
    )
    inside = best = 0
    delay_s = 0.0
    for number, (place_s, ends) in enumerate(edges):
        inside += -1 if ends else 1
        if inside > best:
            best, delay_s = inside, (place_s + edges[number + 1][0]) / 2
    return best, delay_s
