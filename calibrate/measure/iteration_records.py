"""What each logged iteration computed, worked out from the requests that were sent.

The log tells how many prompts and decodes an iteration had, not how much KV they read. That follows from the requests:
they are sent again through the simulated scheduler (``sim.engine``), each entering when the log shows it admitted.
Where the scheduler's batch has other counts than the log, the record says so (``matched``), and so do all after it in
the same stretch.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan, nan
from typing import NamedTuple

import pandas as pd

from real.experts.iteration_log import IterationLine
from sim.engine import Batch, Engine, EngineRequest
from sim.fleet import EngineSettings

ITERATION_COLUMNS = {
    "point": "str",
    "iteration": "int64",
    "ended_s": "float64",
    "context_requests": "int64",
    "context_tokens": "int64",
    "generation_requests": "int64",
    "generation_tokens": "int64",
    "elapsed_s": "float64",
    "cycle_s": "float64",
    "kv_usage": "float64",
    "prefill_tokens": "int64",
    "prefill_chunks": "int64",
    "prefill_attention_pairs": "float64",
    "prefill_kv_tokens": "int64",
    "decodes": "int64",
    "decode_kv_tokens": "int64",
    "matched": "bool",
}
"""One row per iteration. ``cycle_s``: from the end of the one before to its own end, NaN when the engine was idle
between them. ``prefill_*`` and ``decode*`` are the fields of ``sim.service_curve.IterationWork``, 0 if not matched."""

SENT_COLUMNS = {
    "point": "str",
    "number": "int64",
    "prompt_tokens": "int64",
    "output_tokens": "int64",
    "sent_s": "float64",
    "first_token_s": "float64",
    "last_token_s": "float64",
    "chunks": "int64",
    "failure": "str",
}
"""One row per request: times on the monotonic clock, NaN where there are none; ``failure`` is empty for a good one."""

_SEARCHED = 12  # requests looked at for the ones that an iteration admitted


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRequest:
    """One request as its user saw it; the fields are the columns of SENT_COLUMNS."""

    point: str
    number: int
    prompt_tokens: int
    output_tokens: int
    sent_s: float
    first_token_s: float = nan
    last_token_s: float = nan
    chunks: int = 0
    failure: str = ""


class LoggedCounts(NamedTuple):
    """A batch as vLLM counts it: a recomputed request with output is generation, whatever its tokens."""

    context_requests: int
    context_tokens: int
    generation_requests: int
    generation_tokens: int


def counts_of(batch: Batch[EngineRequest]) -> LoggedCounts:
    """Return what vLLM would log of a simulated batch."""
    fresh = [tokens for request, tokens in batch.chunks if not request.generated_tokens]
    resumed = [tokens for request, tokens in batch.chunks if request.generated_tokens]
    return LoggedCounts(
        context_requests=len(fresh),
        context_tokens=sum(fresh),
        generation_requests=batch.decodes + len(resumed),
        generation_tokens=batch.decodes + sum(resumed),
    )


def counts_of_line(line: IterationLine) -> LoggedCounts:
    """Return the counts of a logged iteration."""
    return LoggedCounts(
        context_requests=line.context_requests,
        context_tokens=line.context_tokens,
        generation_requests=line.generation_requests,
        generation_tokens=line.generation_tokens,
    )


def reconstruct(
    lines: Sequence[IterationLine], sent: Iterable[SentRequest], settings: EngineSettings, point: str
) -> pd.DataFrame:
    """Return the records (ITERATION_COLUMNS) of iterations that started and ended with an idle engine.

    Args:
        lines: of one engine, in order.
        sent: all requests that were in them; failed ones may leave the records after them unmatched.
        settings: of the engine.
        point: name of what was measured.
    """
    engine: Engine[EngineRequest] = Engine(settings)
    queue = _Arrivals(sent, [line.ended_s for line in lines])
    matched, busy = True, False
    rows = []
    for number, line in enumerate(lines):
        wanted = counts_of_line(line)
        work = None
        if matched:
            queue.let_in(engine, wanted)
            batch = engine.schedule()
            while batch is not None and batch.preempted and not batch.decodes and not batch.chunks:
                engine.finish_run(1)  # computes nothing, and is not logged
                batch = engine.schedule()
            matched = batch is not None and counts_of(batch) == wanted
            if matched and batch is not None:
                work = engine.work(batch)
                engine.finish_run(1)
        prefill_tokens, chunks, pairs, prefill_kv_tokens, decodes, decode_kv_tokens = work or (0, 0, 0.0, 0, 0, 0)
        rows.append(
            (
                point,
                line.iteration,
                line.ended_s,
                *(wanted.context_requests, wanted.context_tokens),
                *(wanted.generation_requests, wanted.generation_tokens),
                line.elapsed_s,
                line.ended_s - lines[number - 1].ended_s if busy else nan,
                nan if line.kv_usage is None else line.kv_usage,
                *(prefill_tokens, chunks, float(pairs), prefill_kv_tokens, decodes, decode_kv_tokens),
                matched,
            )
        )
        busy = matched and bool(engine.queued or any(not _done(r, engine.iteration) for r in engine.running))
    return pd.DataFrame(rows, columns=list(ITERATION_COLUMNS)).astype(ITERATION_COLUMNS)


def admissions(
    lines: Sequence[IterationLine], sent: Sequence[SentRequest], settings: EngineSettings
) -> list[int | None]:
    """Return in which of the iterations each request was admitted, None where the log is not understood."""
    engine: Engine[EngineRequest] = Engine(settings)
    queue = _Arrivals(sent, [line.ended_s for line in lines])
    admitted: dict[EngineRequest, int] = {}
    for number, line in enumerate(lines):
        queue.let_in(engine, counts_of_line(line))
        batch = engine.schedule()
        if batch is None or counts_of(batch) != counts_of_line(line):
            break
        for request in batch.admitted:
            admitted.setdefault(request, number)
        engine.finish_run(1)
    return [admitted.get(request) for request in queue.requests]


def sent_frame(sent: Iterable[SentRequest]) -> pd.DataFrame:
    """Return requests as a frame of SENT_COLUMNS."""
    rows = [tuple(getattr(request, name) for name in SENT_COLUMNS) for request in sent]
    return pd.DataFrame(rows, columns=list(SENT_COLUMNS)).astype(SENT_COLUMNS)


def lines_of(records: pd.DataFrame) -> list[IterationLine]:
    """Return the log lines that records (``ITERATION_COLUMNS``) were made of."""
    return [
        IterationLine(
            engine=0,
            iteration=row["iteration"],
            ended_s=row["ended_s"],
            context_requests=row["context_requests"],
            context_tokens=row["context_tokens"],
            generation_requests=row["generation_requests"],
            generation_tokens=row["generation_tokens"],
            elapsed_s=row["elapsed_s"],
            kv_usage=None if isnan(row["kv_usage"]) else row["kv_usage"],
        )
        for row in records.to_dict("records")
    ]


def sent_of(requests: pd.DataFrame) -> list[SentRequest]:
    """Return requests from rows of SENT_COLUMNS."""
    return [SentRequest(**{str(name): value for name, value in row.items()}) for row in requests.to_dict("records")]


def _done(request: EngineRequest, iteration: int) -> bool:
    return 0 <= request.last_iteration <= iteration


class _Arrivals:
    """Requests in the order in which the engine admitted them, as far as their first tokens tell.

    Attributes:
        requests: in the order given.
    """

    def __init__(self, sent: Iterable[SentRequest], ends_s: Sequence[float]):
        requests = list(sent)
        # A first token reaches its user after the log line of its iteration and before the next one.
        order = sorted(
            range(len(requests)),
            key=lambda n: (
                len(ends_s) if isnan(requests[n].first_token_s) else bisect_right(ends_s, requests[n].first_token_s),
                requests[n].sent_s,
            ),
        )
        self.requests = [EngineRequest(request.prompt_tokens, request.output_tokens) for request in requests]
        self._pending = deque(self.requests[n] for n in order)

    def let_in(self, engine: Engine[EngineRequest], wanted: LoggedCounts) -> None:
        """Queue the requests that an iteration with these counts admits, beyond those waiting already.

        A prompt that had to wait is let in late, which makes no difference: the engine serves them in this order.
        """
        unfinished = [r for r in engine.running if r.last_iteration < 0 and not r.generated_tokens]
        waiting = [r for r in engine.waiting if not r.generated_tokens]
        missing = wanted.context_requests - len(unfinished) - len(waiting)
        if missing <= 0:
            return
        budget = engine.settings.max_num_batched_tokens - wanted.generation_tokens
        known = [*(r.prompt_tokens - r.computed_tokens for r in unfinished), *(r.prompt_tokens for r in waiting)]
        chosen = self._choose(missing, wanted.context_tokens - min(sum(known), budget), budget - sum(known))
        for request in chosen:
            self._pending.remove(request)
            engine.add(request)

    def _choose(self, count: int, tokens: int, budget: int) -> list[EngineRequest]:
        """The next so many requests, or where their tokens do not fit the log the nearest that do."""
        pending = list(self._pending)
        first = pending[:count]
        if min(sum(r.prompt_tokens for r in first), budget) == tokens or count > _SEARCHED:
            return first
        for others in combinations(pending[: max(count + 2, _SEARCHED)], count):
            if min(sum(r.prompt_tokens for r in others), budget) == tokens:
                return list(others)
        return first
