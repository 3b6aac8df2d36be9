"""The iterations of one replica as a trace for Perfetto (ui.perfetto.dev) or ``chrome://tracing``."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

PROCESS = 1
ENGINE_THREAD = 1


class TracedIteration(NamedTuple):
    """One engine iteration.

    Attributes:
        start_s: since the run began.
        prefill_tokens: prompt (or recomputed) tokens processed.
        decodes: requests that decode one token.
        kv_usage: share of KV blocks in use when it starts.
        waiting: requests in the engine's waiting queue when it starts.
        prefills: requests that those prefill tokens belong to.
    """

    start_s: float
    duration_s: float
    prefill_tokens: int
    decodes: int
    kv_usage: float
    waiting: int
    prefills: int


def chrome_trace(iterations: Iterable[TracedIteration], replica: str) -> str:
    """Return the JSON of a trace named after ``replica``: a slice per iteration, and counters of load.

    Times are microseconds, as the Trace Event Format wants them. A slice is named by what the iteration did
    (``prefill``, ``decode`` or ``mixed``), so that the viewer colours the three apart. After an idle time the counters
    fall to zero decodes at the end of the last iteration before it.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": PROCESS, "name": "process_name", "args": {"name": replica}},
        {"ph": "M", "pid": PROCESS, "tid": ENGINE_THREAD, "name": "thread_name", "args": {"name": "engine iterations"}},
    ]
    end_us = None
    for iteration in iterations:
        start_us = iteration.start_s * 1e6
        if end_us is not None and start_us - end_us > 1:  # a gap of more than the format's resolution
            events += _counters(end_us, batch={"prefill tokens": 0, "decodes": 0})
        end_us = start_us + iteration.duration_s * 1e6
        work = {"prefill_tokens": iteration.prefill_tokens, "decodes": iteration.decodes}
        kind = "mixed" if all(work.values()) else "prefill" if iteration.prefill_tokens else "decode"
        events.append(
            {
                "ph": "X",
                "pid": PROCESS,
                "tid": ENGINE_THREAD,
                "name": kind,
                "ts": start_us,
                "dur": iteration.duration_s * 1e6,
                "args": work,
            }
        )
        events += _counters(
            start_us,
            batch={"prefill tokens": iteration.prefill_tokens, "decodes": iteration.decodes},
            kv_usage={"%": iteration.kv_usage * 100},
            waiting={"requests": iteration.waiting},
        )
    if end_us is not None:
        events += _counters(end_us, batch={"prefill tokens": 0, "decodes": 0})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)


def _counters(at_us: float, **tracks: dict[str, float]) -> list[dict[str, Any]]:
    """One event per counter track."""
    return [
        {"ph": "C", "pid": PROCESS, "name": name.replace("_", " "), "ts": at_us, "args": values}
        for name, values in tracks.items()
    ]
