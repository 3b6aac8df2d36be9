"""Whether the simulated scheduler forms the real engine's batches under live arrivals.

The clock is the real one: every iteration starts and ends when the log says. Only the batches are the simulation's. A
request enters when the front end is done with it, one after another (``calibrate.measure.engine_entry``). By that
alone, a request that is done about when an iteration starts may enter one iteration earlier or later than it really
did, and the batches differ until it ends. So there is a second look, in which each request may enter an iteration
earlier or later where the log shows that it did; what still differs then is the scheduler's fault, not the clock's.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from calibrate.measure.engine_entry import Entry, EntrySample, decision_times, fit_entry
from calibrate.measure.iteration_records import LoggedCounts, SentRequest, admissions, counts_of, counts_of_line
from real.experts.iteration_log import IterationLine
from sim.engine import Batch, Engine, EngineRequest
from sim.fleet import EngineSettings

JITTER = 1
"""Iterations by which a request may enter earlier or later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveAgreement:
    """How alike real and simulated batches are; shares are of all iterations or of all requests.

    Attributes:
        entry: how the front end lets requests in, as these very requests tell.
        exact: iterations with equal counts when every request enters when the front end is done with it.
        within_jitter: the same when it may enter one iteration earlier or later.
        admitted_same: requests admitted in the same iteration, by the front end alone.
        admitted_near: at most one iteration apart.
        batch_real, batch_simulated: requests per iteration, mean, by the front end alone.
        first_difference: the first iteration that differs even within jitter, with both counts; None when none does.
    """

    iterations: int
    requests: int
    entry: Entry
    exact: float
    within_jitter: float
    admitted_same: float
    admitted_near: float
    batch_real: float
    batch_simulated: float
    first_difference: str | None


def compare_live(
    lines: Sequence[IterationLine], sent: Iterable[SentRequest], settings: EngineSettings
) -> LiveAgreement:
    """Replay requests through the simulated scheduler by the real clock and compare batch by batch.

    Args:
        lines: of one engine, from idle to idle.
        sent: every request that was in them.
        settings: of the engine.

    Raises:
        ValueError: there are no lines or no requests.
    """
    requests = sorted(sent, key=lambda request: request.sent_s)
    if not lines or not requests:
        raise ValueError("live batches need at least one iteration and one request")
    starts_s = decision_times(lines, settings)
    wanted = [counts_of_line(line) for line in lines]
    real = admissions(lines, requests, settings)
    entry = fit_entry([EntrySample(lines=lines, sent=requests, admitted=real, settings=settings)])
    # A request enters with the first decision that is made after its arrival.
    due = [bisect_left(starts_s, entered_s) for entered_s in entry.entries_s(requests)]
    exact, admitted = _replay(requests, due, wanted, settings, jitter=0)
    near, _ = _replay(requests, due, wanted, settings, jitter=JITTER)
    pairs = zip(admitted, real, strict=True)
    shifts = np.array([len(lines) if ours is None or theirs is None else abs(ours - theirs) for ours, theirs in pairs])
    differs = next((number for number, ours in enumerate(near) if ours != wanted[number]), None)
    difference = None
    if differs is not None:
        what = f"real {_text(wanted[differs])}, simulated {_text(near[differs])}"
        difference = f"iteration {lines[differs].iteration}: {what}"
    return LiveAgreement(
        iterations=len(lines),
        requests=len(requests),
        entry=entry,
        exact=_share(ours == theirs for ours, theirs in zip(exact, wanted, strict=True)),
        within_jitter=_share(ours == theirs for ours, theirs in zip(near, wanted, strict=True)),
        admitted_same=float((shifts == 0).mean()),
        admitted_near=float((shifts <= JITTER).mean()),
        batch_real=float(np.mean([_size(each) for each in wanted])),
        batch_simulated=float(np.mean([_size(each) for each in exact])),
        first_difference=difference,
    )


def _replay(
    requests: Sequence[SentRequest],
    due: Sequence[int],
    wanted: Sequence[LoggedCounts],
    settings: EngineSettings,
    *,
    jitter: int,
) -> tuple[list[LoggedCounts], list[int | None]]:
    """Return the simulated counts of each iteration and in which one each request was admitted.

    A request must have entered ``jitter`` iterations after it is due and may as many before, as the log shows.
    """
    engine: Engine[EngineRequest] = Engine(settings)
    ours = [EngineRequest(request.prompt_tokens, request.output_tokens) for request in requests]
    number_of = {request: number for number, request in enumerate(ours)}
    outside = sorted(range(len(ours)), key=lambda number: (due[number], requests[number].sent_s))
    counts: list[LoggedCounts] = []
    admitted: list[int | None] = [None] * len(ours)
    for number, want in enumerate(wanted):
        for each in [each for each in outside if due[each] + jitter <= number]:
            engine.add(ours[each])
            outside.remove(each)
        if jitter:
            _let_in(engine, ours, outside, [each for each in outside if due[each] - jitter <= number], want)
        batch = _next(engine)
        for request in batch.admitted if batch else ():
            place = number_of[request]
            admitted[place] = number if admitted[place] is None else admitted[place]
        counts.append(counts_of(batch) if batch else LoggedCounts(0, 0, 0, 0))
        if batch:
            engine.finish_run(1)
    return counts, admitted


def _let_in(
    engine: Engine[EngineRequest],
    ours: Sequence[EngineRequest],
    outside: list[int],
    allowed: Sequence[int],
    want: LoggedCounts,
) -> None:
    """Let in those of the allowed requests that the real engine must have had."""
    unfinished = sum(r.last_iteration < 0 and not r.generated_tokens for r in engine.running)
    waiting = [r for r in engine.waiting if not r.generated_tokens]
    missing = want.context_requests - unfinished - len(waiting)
    if missing <= 0:
        return
    have = sum(r.prompt_tokens - r.computed_tokens for r in engine.running if r.last_iteration < 0)
    have += sum(r.prompt_tokens for r in waiting)
    budget = engine.settings.max_num_batched_tokens - want.generation_tokens
    # Of equally possible ones the set whose tokens fit the log.
    chosen = list(allowed[:missing])
    for others in combinations(allowed[: missing + 8], missing) if missing <= 8 else ():
        if min(have + sum(ours[each].prompt_tokens for each in others), budget) == want.context_tokens:
            chosen = list(others)
            break
    for each in chosen:
        engine.add(ours[each])
        outside.remove(each)


def _next(engine: Engine[EngineRequest]) -> Batch[EngineRequest] | None:
    batch = engine.schedule()
    while batch is not None and batch.preempted and not batch.decodes and not batch.chunks:
        engine.finish_run(1)  # computes nothing, and is not logged
        batch = engine.schedule()
    return batch


def _share(flags: Iterable[bool]) -> float:
    values: NDArray[np.bool_] = np.array(list(flags))
    return float(values.mean())


def _size(counts: LoggedCounts) -> int:
    return counts.context_requests + counts.generation_requests


def _text(counts: LoggedCounts) -> str:
    return (
        f"{counts.context_requests} prompts of {counts.context_tokens} tokens and {counts.generation_requests} decodes"
    )
