"""Whether the load client kept up: how late its event loop ran, how late it sent, and what share of a core it took.

A client that lags adds its own delay to every latency it reports. That cannot be taken out afterwards, so it is
measured beside them and said.
"""

import asyncio
from array import array
from time import monotonic, process_time

import numpy as np

TICK_S = 0.01
LAG_LIMIT_S = 0.005
LAG_SHARE_OF_TTFT = 0.1
LAG_FLOOR_S = 0.002
"""Below this nothing is said: the event loop's timers count whole milliseconds."""
BUSY_LIMIT = 0.8  # of a core
SHORTEST_S = 1.0  # in less, a share of a core says nothing


class ClientLag:
    """A ticker in the client's event loop, and the lateness of what it was to send."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        """Start ticking."""
        self._loop = loop
        self._lags_s = array("d")
        self._late_s = array("d")
        self._began_s, self._cpu_began_s = monotonic(), process_time()
        self._elapsed_s = self._cpu_s = 0.0
        self._due_s = monotonic() + TICK_S
        self._timer = loop.call_later(TICK_S, self._tick)

    def sent(self, due_s: float, now_s: float) -> None:
        """Take note of one request that was due at ``due_s``."""
        self._late_s.append(max(0.0, now_s - due_s))

    def restart(self) -> None:
        """Forget what was before the measured window."""
        del self._lags_s[:], self._late_s[:]
        self._began_s, self._cpu_began_s = monotonic(), process_time()

    def stop(self) -> None:
        """End the ticker; figures are of the time until now."""
        self._timer.cancel()
        self._elapsed_s, self._cpu_s = monotonic() - self._began_s, process_time() - self._cpu_began_s

    def _tick(self) -> None:
        now_s = monotonic()
        self._lags_s.append(max(0.0, now_s - self._due_s))
        self._due_s = now_s + TICK_S
        self._timer = self._loop.call_later(TICK_S, self._tick)

    @property
    def cpu_share(self) -> float:
        """Share of one core that this process took."""
        return self._cpu_s / self._elapsed_s if self._elapsed_s else float("nan")

    def text(self) -> str:
        """The figures in one line."""
        return (
            f"event loop late by {_spread(self._lags_s)}; requests sent late by {_spread(self._late_s)}; "
            f"{self.cpu_share:.0%} of a core"
        )

    def notes(self, median_ttft_s: float) -> list[str]:
        """What a reader of the latencies must know about the client.

        Args:
            median_ttft_s: as measured; NaN where nothing was.
        """
        notes = []
        limit_s = LAG_LIMIT_S
        if median_ttft_s == median_ttft_s:
            limit_s = max(LAG_FLOOR_S, min(LAG_LIMIT_S, LAG_SHARE_OF_TTFT * median_ttft_s))
        lag_s = _percentile(self._lags_s, 99)
        if lag_s > limit_s:
            notes.append(
                f"the load client did not keep up: its event loop ran late by {lag_s * 1e3:.1f} ms (p99; limit "
                f"{limit_s * 1e3:.1f} ms), which is in every latency here; give it a core of its own or fewer users"
            )
        late_s = _percentile(self._late_s, 99)
        if late_s > max(limit_s, 2 * LAG_FLOOR_S):
            notes.append(
                f"the load client sent late: by {late_s * 1e3:.1f} ms (p99) after requests were due; latencies count "
                "from the real send, so the load was lighter than the file's"
            )
        if self.cpu_share > BUSY_LIMIT and self._elapsed_s > SHORTEST_S:
            notes.append(
                f"the load client used {self.cpu_share:.0%} of a core: near its limit, latencies may be its own"
            )
        return notes


def _percentile(values: "array[float]", percent: float) -> float:
    return float(np.percentile(np.frombuffer(values), percent)) if values else float("nan")


def _spread(values: "array[float]") -> str:
    if not values:
        return "- ms"
    p50, p99, most = (np.percentile(np.frombuffer(values), (50, 99, 100)) * 1e3).tolist()
    return f"{p50:.2f} ms p50, {p99:.2f} ms p99, {most:.2f} ms at most"
