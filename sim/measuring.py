"""What of a run is measured: when the window opens, when the run is over, and whether its figures are steady.

The same rules for simulated and for real runs, so that both measure the same requests.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isnan, nan
from typing import Any

from numpy.typing import NDArray

from sim.records import COMPLETED
from sim.spec import ClosedLoop, Fixed, OpenLoop, RunSpec, Trace, WorkloadSpec
from sim.streams import stream

STEADY = 0.05
IN_STEP = (
    "users start at once, and with constant lengths and think time they stay in step: TTFT is that of their bursts; "
    "vary lengths or think time, or set ramp_up_s"
)
NOT_WARM = "the run ended before its warm-up did: nothing was measured; give a longer run"


def replication_seed(seed: int, replication: int) -> int:
    """Return the seed of one replication's traffic and decisions."""
    return int(stream(seed, "replication", replication).integers(2**62))


def completions_to_measure(workload: WorkloadSpec, run: RunSpec, load: float) -> tuple[int | None, int]:
    """Return how many completions a run measures and how many before them it leaves out (see ``RunSpec``).

    None instead of the first: until ``duration_s`` has passed, or the trace is over.
    """
    measured: int | None
    match workload.load:
        case ClosedLoop():
            per_user = round((run.requests_per_user or 0) * load)
            measured = max(run.requests or 0, per_user) or max(500, 4 * int(load))
            warm_up = int(load)
        case OpenLoop():
            measured = run.requests or 2000
            warm_up = measured // 10
        case Trace():
            measured = run.requests
            warm_up = 0
    if run.duration_s is not None:
        measured = None
    if run.warm_up_s is not None:
        warm_up = 0
    elif run.warm_up_requests is not None:
        warm_up = run.warm_up_requests
    return measured, warm_up


class Window:
    """The measured part of a run, by the requests that ended so far.

    Attributes:
        start_s: when it opened; NaN before.
        last: ended requests at which the run is over; None: it ends otherwise.
        opens_at_s: when it opens by the clock; None: by requests that ended.
    """

    def __init__(self, workload: WorkloadSpec, run: RunSpec, load: float):
        self._measured, self._warm_up = completions_to_measure(workload, run, load)
        self._ramp_up_s = workload.load.ramp_up_s if isinstance(workload.load, ClosedLoop) else 0.0
        self._warm = run.warm_up_s is None and not self._warm_up
        self.start_s = nan
        self.last = None if self._measured is None else self._warm_up + self._measured
        self.opens_at_s = 0.0 if self._warm and not self._ramp_up_s else run.warm_up_s

    def open(self, now_s: float) -> None:
        """Let measuring begin now."""
        self.start_s = now_s

    def count(self, now_s: float, before: int, ended: int) -> bool:
        """Take note that ``ended`` requests ended where it was ``before``; return whether this opens the window."""
        if before < self._warm_up <= ended:
            self._warm = True
        if not self._warm or not isnan(self.start_s) or now_s < self._ramp_up_s:
            return False
        self.open(now_s)
        if self._measured is not None:
            self.last = ended + self._measured
        return True

    def is_over(self, ended: int) -> bool:
        """Whether as many requests ended as are to be measured."""
        return self.last is not None and ended >= self.last and not isnan(self.start_s)


def in_step(workload: WorkloadSpec, users: float) -> bool:
    """Whether users send in bursts for ever because nothing ever puts them out of step."""
    load = workload.load
    return (
        isinstance(load, ClosedLoop)
        and users > 1
        and not load.ramp_up_s
        and isinstance(load.think_time_s, Fixed)
        and all(isinstance(spec.output_tokens, Fixed) for spec in workload.classes.values())
        and len({(spec.output_tokens, spec.prompt_tokens) for spec in workload.classes.values()}) == 1
    )


def unsteady(
    requests: Mapping[str, NDArray[Any]],
    window_s: tuple[float, float],
    *,
    closed_loop: bool,
    inside: float,
    in_flight_at_start: int,
    in_flight_at_end: int,
) -> list[str]:
    """Say so when the window's figures are not those of a steady state.

    Args:
        requests: columns of ``REQUEST_COLUMNS``.
        window_s: what was measured.
        closed_loop: whether users wait for answers.
        inside: mean number of requests in the system over the window.
        in_flight_at_start: requests in the system when the window opened, and when the run ended.
        in_flight_at_end: see before.
    """
    length_s = window_s[1] - window_s[0]
    last_s = requests["last_token_s"]
    measured = (requests["status"] == COMPLETED) & (last_s > window_s[0]) & (last_s <= window_s[1])
    if length_s <= 0:
        return []
    if not measured.any():
        return ["no request completed in the measured time; give a longer run"]
    if not closed_loop:
        if in_flight_at_end > 1.5 * in_flight_at_start + 20:
            return [
                "not steady: requests in flight grew by more than half while measuring, so the load exceeds the "
                "fleet and latencies grow with the length of the run"
            ]
        return []
    # Little's law holds over any window for those in it; when those who left it differ, it is too short.
    left = measured.sum() / length_s * float((last_s - requests["sent_s"])[measured].mean())
    if inside and abs(left / inside - 1) > STEADY:
        return [
            f"not steady: throughput times latency is over {STEADY:.0%} off the requests in flight; measure longer "
            "(run.requests_per_user or run.duration_s)"
        ]
    return []


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Let the collector of cyclic garbage, of which a run makes none, look less often: it walks every live request."""
    thresholds = gc.get_threshold()
    gc.set_threshold(max(thresholds[0], 100_000), *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
