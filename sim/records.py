"""Raw measurements of one run, simulated or real: timestamps and counts, from which ``sim.metrics`` derives."""

from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

REQUEST_COLUMNS: dict[str, str] = {
    # name -> dtype; times are seconds since the run began, NaN where not reached or not observed
    "request_id": "int64",
    "user_id": "int64",  # -1 in an open loop or a trace
    "class_index": "int16",  # true class, index into the workload's classes
    "routed_class_index": "int16",  # what the router took it for; -1 when it did not tell
    "expert_index": "int16",  # index into the fleet's experts; -1 when none was chosen
    "replica_index": "int16",  # within the expert
    "prompt_tokens": "int32",
    "output_tokens": "int32",
    "cached_prompt_tokens": "int32",  # prefix hits at first admission; -1 where a real engine does not tell
    "preemptions": "int32",  # -1 where a real engine does not tell
    "sent_s": "float64",  # by the user
    "router_start_s": "float64",  # a worker takes it up; before that it waits
    "router_end_s": "float64",  # expert and replica chosen
    "front_end_start_s": "float64",  # the replica's front end takes it up
    "engine_arrival_s": "float64",  # in the engine's waiting queue
    "scheduled_s": "float64",  # first iteration with a chunk of it begins
    "first_token_engine_s": "float64",  # the iteration that makes its first token ends
    "first_token_s": "float64",  # the user has the first token
    "last_token_engine_s": "float64",
    "last_token_s": "float64",  # the user has the last token
    "status": "int8",  # index into STATUSES
    "http_status": "int16",  # of the answer, 0 before it; 200 of a failed request: it broke off after it had begun
}

STATUSES = ("completed", "failed", "in_flight")
COMPLETED, FAILED, IN_FLIGHT = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGaps:
    """Every gap between two successive tokens of one request as its user saw it, as weighted values.

    A gap shared by many requests of a batch is one row with that weight.

    Attributes:
        expert_index: shape (n,).
        gap_s: shape (n,), seconds.
        weight: shape (n,), how many gaps.
    """

    expert_index: NDArray[np.int16]
    gap_s: NDArray[np.float64]
    weight: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """Time averages of one replica's engine over the measured window; NaN where a run cannot know it.

    Attributes:
        utilization: share of the window in which the engine ran an iteration.
        batch_size: mean number of scheduled requests per iteration, weighted by iteration time.
        running: mean number of requests that hold a slot.
        waiting: mean number of requests in the engine's waiting queue.
        kv_usage: time-mean share of KV blocks in use; ``kv_usage_max`` its maximum at the start of iterations.
        front_end_utilization: share of the window in which the front-end process was busy.
        preemptions: in the window.
        iterations: in the window.
        engine_requests: a real engine's own account of the requests that ended in the window: how many, and the mean
            seconds of one in its queue, in prefill, in decode, and from its front end's beginning with it to its end.
            NaN in a simulation, whose requests have the times.
        iteration_error: share of an iteration's time that 90 % of predictions are within, at the largest work it did.
        range_widening: factor on that error for how far the work went beyond the curve's fitted range, 1 inside.
    """

    expert_index: int
    replica_index: int
    utilization: float
    batch_size: float
    running: float
    waiting: float
    kv_usage: float
    kv_usage_max: float
    front_end_utilization: float
    preemptions: float
    iterations: float
    engine_requests: float = nan
    engine_queue_s: float = nan
    engine_prefill_s: float = nan
    engine_decode_s: float = nan
    engine_e2e_s: float = nan
    iteration_error: float = nan
    range_widening: float = nan


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    """Time averages of the router over the measured window.

    Attributes:
        utilization: busy share of all workers, requests and streamed tokens together.
        requests: mean number of requests in it, waiting or being served.
        second_tries: requests of the whole run that it sent to another replica when one died; NaN where not told.
    """

    utilization: float
    requests: float
    second_tries: float = nan


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One fleet at one load in one replication.

    Attributes:
        fleet: name of the fleet.
        load_kind: ``closed_loop``, ``open_loop`` or ``trace``.
        load: users, or requests per second, or NaN for a trace.
        replication: 0-based.
        expert_names: in the order of ``expert_index``.
        class_names: in the order of ``class_index``.
        requests: one array per name of REQUEST_COLUMNS, equal lengths; every request sent, warm-up included.
        gaps: of the requests that completed inside the window.
        window_s: start and end of the measured window. A request is measured when its ``last_token_s`` (or, failed,
            its end) lies in ``(start, end]``.
        replicas: one entry per replica.
        router: None for a fleet without one.
        notes: what a reader of the figures must know (truncation, extrapolation, growing backlog).
        checks: name of each self-check -> what it found; a failed check raises instead.
        began_monotonic_s: ``time.monotonic()`` at time 0 of a real run; NaN for a simulated one.
    """

    fleet: str
    load_kind: str
    load: float
    replication: int
    expert_names: tuple[str, ...]
    class_names: tuple[str, ...]
    requests: dict[str, NDArray[Any]]
    gaps: TokenGaps
    window_s: tuple[float, float]
    replicas: tuple[ReplicaStats, ...]
    router: RouterStats | None
    notes: tuple[str, ...] = ()
    checks: dict[str, str] = field(default_factory=dict)
    began_monotonic_s: float = nan
