"""What the engines say of themselves while a run measures them: vLLM's Prometheus figures, asked every two seconds."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import nan
from time import monotonic
from typing import Any

import numpy as np

from sim.records import ReplicaStats

POLL_S = 2.0
"""An answer costs the server's front end some 15 ms, and where it shares the engine's core, the engine as well."""
ANSWER_S = 5.0
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
}
COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:iteration_tokens_total_count": "iterations",
    "vllm:request_queue_time_seconds_sum": "queue_s",
    "vllm:request_prefill_time_seconds_sum": "prefill_s",
    "vllm:request_decode_time_seconds_sum": "decode_s",
    "vllm:request_decode_time_seconds_count": "requests",
    "vllm:e2e_request_latency_seconds_sum": "e2e_s",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:prefix_cache_queries_total": "prefix_queries",
}
WANTED = {**GAUGES, **COUNTERS}


@dataclass(frozen=True, slots=True)
class ReplicaUrl:
    """Where one replica listens."""

    expert_index: int
    replica_index: int
    url: str


@dataclass(slots=True)
class _Seen:
    """The figures of one replica in the measured window: every sample of the gauges, first and last of the counters."""

    samples: list[dict[str, float]] = field(default_factory=list)


class EngineMetrics:
    """Polls the replicas of one fleet."""

    def __init__(self, replicas: Sequence[ReplicaUrl]):
        self._replicas = list(replicas)
        self._seen = {(each.expert_index, each.replica_index): _Seen() for each in replicas}
        self._asked: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin asking; what was seen before the window opens is forgotten by ``restart``."""
        if self._replicas:
            self._ticker = asyncio.get_running_loop().create_task(self._poll())

    def restart(self) -> None:
        """Forget what was before the measured window, and ask at once, for counters from its beginning."""
        for seen in self._seen.values():
            seen.samples = []
        self._ask_all()

    async def stop(self) -> None:
        """Ask a last time and end."""
        if self._ticker is None:
            return
        self._ticker.cancel()
        self._ask_all()
        await asyncio.gather(*self._asked, return_exceptions=True)

    async def drained(self, within_s: float) -> bool:
        """Wait until no replica has a request any more; return whether that came about."""
        deadline_s = monotonic() + within_s
        while monotonic() < deadline_s:
            found = await asyncio.gather(*(asyncio.to_thread(read_metrics, each.url) for each in self._replicas))
            if any(found) and not any(figures.get("running", 0) + figures.get("waiting", 0) for figures in found):
                return True
            await asyncio.sleep(0.2)
        return False

    def stats(self, expert_index: int, replica_index: int) -> ReplicaStats:
        """Return the averages of one replica over the window: NaN for what no poll saw.

        Utilization is the share of polls that found a request running, and the batch size the mean over these; both
        as exact as a look every POLL_S is. What vLLM does not tell is NaN.
        """
        seen = self._seen.get((expert_index, replica_index))
        samples = [] if seen is None else seen.samples
        running = np.array([sample.get("running", nan) for sample in samples])
        busy = running[running > 0]
        requests = _increase(samples, "requests")
        mean_s = {
            name: _increase(samples, name) / requests if requests > 0 else nan
            for name in ("queue_s", "prefill_s", "decode_s", "e2e_s")
        }
        kv_usage = np.array([sample.get("kv_usage", nan) for sample in samples])
        return ReplicaStats(
            expert_index=expert_index,
            replica_index=replica_index,
            utilization=_mean(running > 0) if _known(running) else nan,
            batch_size=_mean(busy),
            running=_mean(running),
            waiting=_mean(np.array([sample.get("waiting", nan) for sample in samples])),
            kv_usage=_mean(kv_usage),
            kv_usage_max=float(kv_usage.max()) if _known(kv_usage) else nan,
            front_end_utilization=nan,
            preemptions=_increase(samples, "preemptions"),
            iterations=_increase(samples, "iterations"),
            engine_requests=requests,
            engine_queue_s=mean_s["queue_s"],
            engine_prefill_s=mean_s["prefill_s"],
            engine_decode_s=mean_s["decode_s"],
            engine_e2e_s=mean_s["e2e_s"],
        )

    def text(self, names: Mapping[tuple[int, int], str]) -> str:
        """Say in one line a replica what a request met inside its engine, on average over the window."""
        parts = []
        for place, seen in self._seen.items():
            stats = self.stats(*place)
            if not stats.engine_requests > 0:
                continue
            hits = _increase(seen.samples, "prefix_hits")
            queries = _increase(seen.samples, "prefix_queries")
            share = hits / queries if queries > 0 else nan
            parts.append(
                f"{names[place]}: {stats.engine_requests:.0f} requests, queue {stats.engine_queue_s * 1e3:.1f} ms, "
                f"prefill {stats.engine_prefill_s * 1e3:.1f} ms, decode {stats.engine_decode_s * 1e3:.1f} ms "
                f"on average, {share:.1%} of prompt tokens cached, asked {len(seen.samples)} times"
            )
        return "; ".join(parts)

    async def _poll(self) -> None:
        while True:
            self._ask_all()
            await asyncio.sleep(POLL_S)

    def _ask_all(self) -> None:
        for replica in self._replicas:
            task = asyncio.get_running_loop().create_task(self._ask(replica))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)

    async def _ask(self, replica: ReplicaUrl) -> None:
        samples = self._seen[replica.expert_index, replica.replica_index].samples
        figures = await asyncio.to_thread(read_metrics, replica.url)
        if figures:
            samples.append(figures)


def read_metrics(url: str) -> dict[str, float]:
    """Return the figures of ``WANTED`` that a server tells, under our names; none when it does not answer."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=ANSWER_S) as answer:
            text = answer.read().decode()
    except (OSError, ValueError):
        return {}
    return parse_metrics(text)


def parse_metrics(text: str) -> dict[str, float]:
    """Return the figures of ``WANTED`` in a Prometheus text, summed over engines and models."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("vllm:"):
            continue
        head, _, value = line.rpartition(" ")
        name = WANTED.get(head.partition("{")[0])
        if name is not None:
            found[name] = found.get(name, 0.0) + float(value)
    return found


def ask_json(url: str, api_key: str | None = None) -> Any:
    """Return the JSON that a server answers.

    Raises:
        OSError: it does not answer, or with an error.
        ValueError: the answer is no JSON.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=ANSWER_S) as answer:
        return json.loads(answer.read())


def engine_version(url: str) -> str:
    """Return ``vLLM 0.32.0`` as a replica tells it; ``engine unknown`` when it does not."""
    try:
        return f"vLLM {ask_json(url.rstrip('/') + '/version')['version']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "engine unknown"


def _increase(samples: Sequence[Mapping[str, float]], name: str) -> float:
    """How much a counter grew; NaN when it was not seen twice, or a restarted engine counts anew."""
    values = [sample[name] for sample in samples if name in sample]
    if len(values) < 2 or any(after < before for before, after in pairwise(values)):
        return nan
    return values[-1] - values[0]


def _known(values: "np.ndarray[Any, Any]") -> bool:
    return len(values) > 0 and not bool(np.isnan(values).any())


def _mean(values: "np.ndarray[Any, Any]") -> float:
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(known.mean()) if len(known) else nan
