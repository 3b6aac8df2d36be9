"""The Prometheus page of a gateway: what its workers have counted, added up."""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from real.gateway.figures import Figure, read_figures
from real.gateway.metrics import FOLDER_VARIABLE, METRICS

_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class MetricsPage(Collector):
    """Where the workers of one gateway leave their figures, and the port that shows them."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="expert-router-metrics-"))
        self._of_the_dead: dict[Figure, list[float]] = {}
        self._lock = threading.Lock()

    def serve(self, host: str, port: int) -> None:
        """Show the sums at ``/metrics``, from a thread.

        Raises:
            OSError: the port is taken.
        """
        registry = CollectorRegistry()
        registry.register(self)
        try:
            start_http_server(port, host, registry)
        except OSError as error:
            raise OSError(f"serve.metrics_port {port} on {host} cannot be used: {error.strerror}") from None

    def environment(self) -> dict[str, str]:
        """Return what a worker must find in its environment."""
        return {FOLDER_VARIABLE: str(self._folder)}

    def forget(self, pid: int) -> None:
        """Take what a dead worker had under way out of the gauges; its counts stay."""
        path = self._folder / str(pid)
        with self._lock:
            if path.with_suffix(".names").exists():
                counts = {of: row for of, row in read_figures(path).items() if METRICS[of.name].kind != "gauge"}
                _add(self._of_the_dead, counts)
                path.with_suffix(".names").unlink()
                path.with_suffix(".values").unlink()

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def describe(self) -> list[_Family]:
        """Return nothing: what there is depends on the requests."""
        return []

    def collect(self) -> Iterator[_Family]:
        """Yield all metrics with their samples."""
        with self._lock:
            sums: dict[Figure, list[float]] = {}
            _add(sums, self._of_the_dead)
            for path in sorted(self._folder.glob("*.names")):
                _add(sums, read_figures(path))
        families = {name: _family(name) for name in METRICS}
        for of, row in sums.items():
            family = families[of.name]
            if isinstance(family, HistogramMetricFamily):
                bounds = (*map(str, map(float, METRICS[of.name].bounds)), "+Inf")
                family.add_metric(of.labels, list(zip(bounds, accumulate(row[:-1]), strict=True)), row[-1])
            else:
                family.add_metric(of.labels, row[0])
        yield from families.values()


def _add(sums: dict[Figure, list[float]], figures: dict[Figure, list[float]]) -> None:
    for of, row in figures.items():
        sums[of] = [a + b for a, b in zip(sums[of], row, strict=True)] if of in sums else row


def _family(name: str) -> _Family:
    metric, full = METRICS[name], f"expert_router_{name}"
    if metric.kind == "counter":
        return CounterMetricFamily(full, metric.text, labels=metric.labels)
    if metric.kind == "gauge":
        return GaugeMetricFamily(full, metric.text, labels=metric.labels)
    return HistogramMetricFamily(full, metric.text, labels=metric.labels)
