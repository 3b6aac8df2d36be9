"""The gateway's speed beside a direct connection: ``python -m benchmarks.gateway [WHAT ...]``.

Mock experts and the load client share core 0; the gateway has core 1 (``workers``: both). Each line is one run; figures
of a few per cent apart are the same. ``added`` is a percentile through the gateway minus the same one direct. ``load``
is how much of core 0 client and expert took: near 1, times tell of them and not of the gateway.
"""

import argparse
import asyncio
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.lean_client import LeanReply, connect, wire_of
from real.gateway.config import GatewayConfig
from real.router.classifier import read_packaged
from tests.kit.processes import Expert, GatewayProcess, Splice, config_for, cpu_s, running

CHUNKS, ITL_S = 64, 0.05
_WORDS = "the quick fox jumps over a lazy dog and runs away from all that code it never wrote".split()  # noqa: SIM905
console = Console(width=160)


def prompt_of(words: int) -> str:
    """A prompt of so many words that a rule takes for code."""
    return " ".join(_WORDS[index % len(_WORDS)] for index in range(words))


@dataclass
class Load:
    """What one run gave.

    Attributes:
        replies: those that began inside the window.
        chunks: reads with bytes of a body inside the window.
        cpu_s: of the gateway in the window; NaN for a direct run.
        load_cores: cores that client and expert took.
    """

    replies: list[LeanReply]
    chunks: int
    window_s: float
    cpu_s: float
    resident_mb: float
    load_cores: float

    def failed(self) -> int:
        """Requests without a whole answer."""
        return sum(not reply.whole for reply in self.replies)

    @property
    def rate_rps(self) -> float:
        """Requests a second."""
        return len(self.replies) / self.window_s

    @property
    def cpu_ms(self) -> float:
        """CPU of the gateway, a request."""
        return self.cpu_s / len(self.replies) * 1e3


async def closed_loop(
    port: int,
    users: int,
    expert: Expert,
    *,
    warm_up_s: float,
    window_s: float,
    spread_s: float,
    gateway: GatewayProcess | Splice | None = None,
    **request: Any,
) -> Load:
    """Users who send one request after another."""
    loop = asyncio.get_running_loop()
    wire = wire_of(request)
    start_s = monotonic() + warm_up_s
    end_s = start_s + window_s
    replies: list[LeanReply] = []

    async def user(index: int) -> None:
        await asyncio.sleep(spread_s * index / users)
        connection = await connect(port, wire)
        while monotonic() < end_s and not connection.lost:
            replies.append(await connection.request())
        connection.transport.abort()

    async def measure() -> tuple[float, float, float]:
        await asyncio.sleep(start_s - monotonic())
        before_s = gateway.cpu_s() if gateway else math.nan, cpu_s(expert.pid) + process_time()
        began_s = loop.time()
        await asyncio.sleep(window_s)
        load_cores = (cpu_s(expert.pid) + process_time() - before_s[1]) / (loop.time() - began_s)
        return (gateway.cpu_s() - before_s[0], gateway.resident_mb(), load_cores) if gateway else (*nothing, load_cores)

    nothing = math.nan, math.nan
    measured = asyncio.create_task(measure())
    await asyncio.gather(*(user(index) for index in range(users)))
    gateway_s, resident_mb, load_cores = await measured
    inside = [reply for reply in replies if start_s <= reply.sent_s < end_s]
    chunks = sum(start_s <= at_s < end_s for reply in replies for at_s in reply.times_s)
    return Load(inside, chunks, window_s, gateway_s, resident_mb, load_cores)


def _ms(values_s: Sequence[float] | np.ndarray[Any, Any], percentile: float) -> float:
    return float(np.percentile(np.asarray(values_s), percentile)) * 1e3


async def paced(folder: Path, users: Sequence[int], window_s: float) -> None:
    """P1: streams of a chunk every 50 ms."""
    table = Table(title=f"streams of {CHUNKS} chunks, {ITL_S * 1e3:g} ms apart, 200-word prompts")
    for name in ("users", "through", "TTFT p50/p99 ms", "E2E p50/p99 ms", "gap p99 ms", "failed"):
        table.add_column(name)
    for name in ("added TTFT p50/p99", "CPU s/1,000 chunks", "of the splice's", "core", "RSS MB", "load"):
        table.add_column(name)
    for count in users:
        direct: tuple[float, float] | None = None
        splice_s = math.nan
        for through in ("direct", "bare splice", "gateway"):
            expert = Expert("code", itl_s=ITL_S, ttft_s=1e-4)
            os.sched_setaffinity(expert.pid, {0})
            gateway: GatewayProcess | Splice | None = None
            if through == "gateway":
                gateway = GatewayProcess(config_for({"code": [expert.url]}), folder)
                pin(gateway, {1})
            elif through == "bare splice":
                gateway = Splice(expert)
                os.sched_setaffinity(gateway.pid, {1})
            with running(*([gateway] if gateway else []), expert):
                load = await closed_loop(
                    gateway.port if gateway else expert.port,
                    count,
                    expert,
                    warm_up_s=CHUNKS * ITL_S + 1,
                    window_s=window_s,
                    spread_s=CHUNKS * ITL_S,
                    gateway=gateway,
                    prompt=prompt_of(200),
                    max_tokens=CHUNKS,
                    stream=True,
                )
            ttfts_s = [reply.ttft_s for reply in load.replies]
            took_s = [reply.took_s for reply in load.replies]
            gaps_s = np.concatenate([np.diff(reply.times_s) for reply in load.replies])
            figures = (_ms(ttfts_s, 50), _ms(ttfts_s, 99))
            direct = direct or figures
            chunk_s = load.cpu_s / load.chunks
            splice_s = chunk_s if through == "bare splice" else splice_s
            table.add_row(
                str(count),
                through,
                f"{figures[0]:.2f} / {figures[1]:.2f}",
                f"{_ms(took_s, 50):.1f} / {_ms(took_s, 99):.1f}",
                f"{_ms(gaps_s, 99):.1f}",
                str(load.failed()),
                f"{figures[0] - direct[0]:.2f} / {figures[1] - direct[1]:.2f}",
                f"{chunk_s * 1e3:.4f}",
                f"{chunk_s / splice_s:.2f}",
                f"{load.cpu_s / load.window_s:.2f}",
                f"{load.resident_mb:.0f}",
                f"{load.load_cores:.2f}",
            )
    console.print(table)


def _packaged(url: str, workers: int = 1) -> GatewayConfig:
    """A gateway that classifies by the classifier of the package, all classes to one expert."""
    config = config_for({"code": [url]}, router={"policy": "class", "workers": workers}, classifier={"kind": "tfidf"})
    classes = list(read_packaged().centres.class_names)
    return config.model_copy(update={"classes": classes, "class_map": {name: ["code"] for name in classes}})


async def requests(folder: Path, window_s: float) -> None:
    """P2: answers of one chunk, as many as one core gives."""
    table = Table(title="answers of one chunk, 32 users")
    for name in ("prompt", "through", "requests/s", "CPU ms a request", "failed", "load"):
        table.add_column(name)
    for words, how in ((5, "round robin"), (500, "rules"), (500, "TF-IDF")):
        for through in ("direct", "bare splice", "gateway"):
            expert = Expert("code")
            os.sched_setaffinity(expert.pid, {0})
            gateway: GatewayProcess | Splice | None = None
            if through == "gateway":
                policy = {"policy": "round_robin" if how == "round robin" else "class"}
                config = _packaged(expert.url) if how == "TF-IDF" else config_for({"code": [expert.url]}, router=policy)
                gateway = GatewayProcess(config, folder)
                pin(gateway, {1})
            elif through == "bare splice":
                gateway = Splice(expert)
                os.sched_setaffinity(gateway.pid, {1})
            with running(*([gateway] if gateway else []), expert):
                load = await closed_loop(
                    gateway.port if gateway else expert.port,
                    32,
                    expert,
                    warm_up_s=1,
                    window_s=window_s,
                    spread_s=0,
                    gateway=gateway,
                    prompt=prompt_of(words),
                    max_tokens=1,
                )
            figures = f"{load.rate_rps:,.0f}", f"{load.cpu_ms:.3f}", str(load.failed()), f"{load.load_cores:.2f}"
            table.add_row(f"{words} words, {how}", through, *figures)
    console.print(table)


async def workers(folder: Path, window_s: float) -> None:
    """P5: two processes on one port, with client and experts on the same two cores."""
    table = Table(
        title="one chunk, 64 users, workers share both cores with client and expert",
        caption="alone: what so many cores of their own would give, by the CPU of a request",
    )
    for name in ("prompt", "workers", "requests/s", "CPU ms a request", "alone", "failed", "load"):
        table.add_column(name)
    for words in (5, 500):
        for count in (1, 2):
            expert = Expert("code")
            router = {"policy": "round_robin", "workers": count}
            config = config_for({"code": [expert.url]}, router=router) if words == 5 else _packaged(expert.url, count)
            gateway = GatewayProcess(config, folder)
            with running(gateway, expert):
                load = await closed_loop(
                    gateway.port,
                    64,
                    expert,
                    warm_up_s=1,
                    window_s=window_s,
                    spread_s=0,
                    gateway=gateway,
                    prompt=prompt_of(words),
                    max_tokens=1,
                )
            table.add_row(
                f"{words} words, {'round robin' if words == 5 else 'TF-IDF'}",
                str(count),
                f"{load.rate_rps:,.0f}",
                f"{load.cpu_ms:.3f}",
                f"{count / load.cpu_ms * 1e3:,.0f}",
                str(load.failed()),
                f"{load.load_cores:.2f}",
            )
    console.print(table)


def pin(gateway: GatewayProcess, cores: set[int]) -> None:
    """Keep a gateway's processes to some cores."""
    for pid in (gateway.pid, *gateway.workers()):
        os.sched_setaffinity(pid, cores)


def main() -> None:
    """Measure what is asked for; everything by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["paced", "requests", "workers"])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--window-s", type=float, default=9.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if "workers" in arguments.what:
            uvloop.run(workers(path, arguments.window_s))
        os.sched_setaffinity(0, {0})
        if "paced" in arguments.what:
            uvloop.run(paced(path, arguments.users, arguments.window_s))
        if "requests" in arguments.what:
            uvloop.run(requests(path, arguments.window_s))


if __name__ == "__main__":
    main()
