"""The gateway's Prometheus metrics, added up over its workers: each writes files of its own, one reader sums them."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_SHORT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800)


class MetricsFolder:
    """Where the workers of one gateway leave their figures, and the port that shows them."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="expert-router-metrics-"))

    def serve(self, host: str, port: int) -> None:
        """Show the sums at ``/metrics``, from a thread.

        Raises:
            OSError: the port is taken.
        """
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(self.path))  # type: ignore[no-untyped-call]
        start_http_server(port, host, registry)

    def environment(self) -> dict[str, str]:
        """Return what a worker must find in its environment."""
        return {_FOLDER: str(self.path)}

    def forget(self, pid: int) -> None:
        """Take what a dead worker had under way out of the gauges; its counts stay."""
        mark_process_dead(pid, str(self.path))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.path, ignore_errors=True)


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
    """The figures of one worker."""

    def __init__(self) -> None:
        assert _FOLDER in os.environ
        name = "expert_router"
        self._received = Counter(f"{name}_requests_received", "completion requests whose headers have arrived")
        self._requests = Counter(
            f"{name}_requests", "completion requests that have ended", ("expert", "class", "outcome")
        )
        self._open = Gauge(f"{name}_open_requests", "received and not ended", multiprocess_mode="livesum")
        self._in_flight = Gauge(f"{name}_inflight", "at a replica", ("expert", "replica"), multiprocess_mode="livesum")
        self._up = Gauge(
            f"{name}_replica_up",
            "workers that would send it requests",
            ("expert", "replica"),
            multiprocess_mode="livesum",
        )
        self._queue = Gauge(f"{name}_queue_depth", "waiting for a place", ("expert",), multiprocess_mode="livesum")
        self._classify = Histogram(f"{name}_classify_seconds", "time of the classifier", buckets=_SHORT_S)
        self._queued = Histogram(f"{name}_queue_seconds", "wait for a place", buckets=_SHORT_S)
        self._ttft = Histogram(f"{name}_ttft_seconds", "arrival to first byte", ("expert",), buckets=_LONG_S)
        self._e2e = Histogram(f"{name}_e2e_seconds", "arrival to end, completed", ("expert",), buckets=_LONG_S)
        self.retries = Counter(f"{name}_retries", "second tries on another replica")
        self._ejections = Counter(f"{name}_ejections", "replicas taken out of rotation", ("expert", "replica"))
        self.client_disconnects = Counter(f"{name}_client_disconnects", "clients that left before their answer's end")
        self._chunks = Counter(f"{name}_chunks", "streamed events passed on, counted at an answer's end", ("expert",))
        self._children: dict[tuple[Any, ...], Any] = {}

    def _of(self, metric: Any, *labels: str) -> Any:
        """The metric with these labels; looked up once."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def begin(self) -> None:
        """Count a request in."""
        self._received.inc()
        self._open.inc()

    def end(self, outcome: Outcome, now_s: float) -> None:
        """Count a request out."""
        self._open.dec()
        self._of(self._requests, outcome.expert, outcome.class_name, outcome.outcome).inc()
        if outcome.classify_s is not None:
            self._classify.observe(outcome.classify_s)
        if outcome.queue_s is not None:
            self._queued.observe(outcome.queue_s)
        if outcome.ttft_s is not None:
            self._of(self._ttft, outcome.expert).observe(outcome.ttft_s)
        if outcome.chunks:
            self._of(self._chunks, outcome.expert).inc(outcome.chunks)
        if outcome.outcome == "completed":
            self._of(self._e2e, outcome.expert).observe(now_s - outcome.arrived_s)
        if outcome.outcome == "cancelled":
            self.client_disconnects.inc()

    def in_flight(self, expert: str, replica: int, count: int) -> None:
        """Note how many requests are at a replica."""
        self._of(self._in_flight, expert, str(replica)).set(count)

    def replica(self, expert: str, replica: int, *, up: bool, ejections: int) -> None:
        """Note the state of a replica; ``ejections`` are new ones."""
        self._of(self._up, expert, str(replica)).set(up)
        if ejections:
            self._of(self._ejections, expert, str(replica)).inc(ejections)

    def queue(self, expert: str, depth: int) -> None:
        """Note how many wait for an expert."""
        self._of(self._queue, expert).set(depth)
