"""What a worker counts: requests by what became of them, times, and what is under way."""

import os
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from real.gateway.figures import FiguresFile

FOLDER_VARIABLE: Final = "EXPERT_ROUTER_METRICS_FOLDER"
_SHORT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        kind: ``counter``, ``histogram``, or ``gauge``, which is of living workers only.
        text: what it counts.
        labels: names of its labels.
        bounds: of a histogram's buckets.
    """

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METRICS: Final = {
    "requests_received": Metric("counter", "completion requests whose headers have arrived"),
    "requests": Metric("counter", "completion requests that have ended", ("expert", "class", "outcome")),
    "open_requests": Metric("gauge", "received and not ended"),
    "inflight": Metric("gauge", "at a replica", ("expert", "replica")),
    "replica_up": Metric("gauge", "workers that would send it requests", ("expert", "replica")),
    "queue_depth": Metric("gauge", "waiting for a place", ("expert",)),
    "classify_seconds": Metric("histogram", "time of the classifier", (), _SHORT_S),
    "queue_seconds": Metric("histogram", "wait for a place", (), _SHORT_S),
    "ttft_seconds": Metric("histogram", "arrival to first byte", ("expert",), _LONG_S),
    "e2e_seconds": Metric("histogram", "arrival to end, completed", ("expert",), _LONG_S),
    "retries": Metric("counter", "second tries on another replica"),
    "ejections": Metric("counter", "replicas taken out of rotation", ("expert", "replica")),
    "client_disconnects": Metric("counter", "clients that left before their answer's end"),
    "chunks": Metric("counter", "streamed events passed on, counted at an answer's end", ("expert",)),
}
"""By name, without ``expert_router_`` before it."""


@dataclass(slots=True)
class Outcome:
    """What became of one request, as metrics and ledger tell it.

    Attributes:
        outcome: ``completed``, ``cancelled`` (by its client), or what went wrong.
        ttft_s: from its arrival to the first byte passed on; None when there was none.
    """

    request_id: str
    arrived_s: float
    outcome: str = "completed"
    status: int | None = None
    class_name: str = ""
    expert: str = ""
    replica: int | None = None
    tries: int = 0
    classify_s: float | None = None
    queue_s: float | None = None
    chosen_s: float | None = None
    ttft_s: float | None = None
    chunks: int = 0


class GatewayMetrics:
    """The figures of one worker, in a file of its own."""

    def __init__(self) -> None:
        self._file = FiguresFile(Path(os.environ[FOLDER_VARIABLE]) / str(os.getpid()))
        self._rows: dict[tuple[str, ...], memoryview[float]] = {}
        rows = {name: self._row(name) for name, metric in METRICS.items() if not metric.labels}
        self._received, self._open = rows["requests_received"], rows["open_requests"]
        self._classify, self._queued = rows["classify_seconds"], rows["queue_seconds"]

    def _row(self, *key: str) -> "memoryview[float]":
        """The numbers of a metric, by its name and labels; made when they are first asked for.

        A histogram has one for each bucket, one for what is beyond them, and the sum.
        """
        row = self._rows.get(key)
        if row is None:
            bounds = METRICS[key[0]].bounds
            row = self._rows[key] = self._file.row(key[0], key[1:], len(bounds) + 2 if bounds else 1)
        return row

    def begin(self) -> None:
        """Count a request in."""
        self._received[0] += 1
        self._open[0] += 1

    def end(self, outcome: Outcome, now_s: float) -> None:
        """Count a request out."""
        expert = outcome.expert
        self._open[0] -= 1
        self._row("requests", expert, outcome.class_name, outcome.outcome)[0] += 1
        if outcome.classify_s is not None:
            _observe(self._classify, _SHORT_S, outcome.classify_s)
        if outcome.queue_s is not None:
            _observe(self._queued, _SHORT_S, outcome.queue_s)
        if outcome.ttft_s is not None:
            _observe(self._row("ttft_seconds", expert), _LONG_S, outcome.ttft_s)
        if outcome.chunks:
            self._row("chunks", expert)[0] += outcome.chunks
        if outcome.outcome == "completed":
            _observe(self._row("e2e_seconds", expert), _LONG_S, now_s - outcome.arrived_s)
        elif outcome.outcome == "cancelled":
            self._row("client_disconnects")[0] += 1

    def retry(self) -> None:
        """Count a second try."""
        self._row("retries")[0] += 1

    def in_flight(self, expert: str, replica: str, count: int) -> None:
        """Note how many requests are at a replica."""
        self._row("inflight", expert, replica)[0] = count

    def replica(self, expert: str, replica: int, *, up: bool, ejections: int) -> None:
        """Note the state of a replica; ``ejections`` are new ones."""
        self._row("replica_up", expert, str(replica))[0] = up
        if ejections:
            self._row("ejections", expert, str(replica))[0] += ejections

    def queue(self, expert: str, depth: int) -> None:
        """Note how many wait for an expert."""
        self._row("queue_depth", expert)[0] = depth


def _observe(row: "memoryview[float]", bounds: tuple[float, ...], value_s: float) -> None:
    row[bisect_left(bounds, value_s)] += 1
    row[-1] += value_s
