"""The gateway's speed beside a direct connection: ``python -m benchmarks.gateway [WHAT ...]``.

Mock experts and the load client share core 0; the gateway has core 1 (``workers``: both). Each line is one run; figures
of a few per cent apart are the same. ``added`` is a percentile through the gateway minus the same one direct.
"""

import argparse
import asyncio
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from tests.kit.client import Client, Reply
from tests.kit.processes import Expert, GatewayProcess, Splice, config_for, running

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
        chunks: body pieces that arrived inside the window.
        cpu_s: of the gateway in the window; NaN for a direct run.
    """

    replies: list[Reply]
    chunks: int
    window_s: float
    cpu_s: float
    resident_mb: float

    def failed(self) -> int:
        """Requests without a whole answer."""
        return sum(reply.outcome != "completed" for reply in self.replies)


async def closed_loop(
    port: int,
    users: int,
    *,
    warm_up_s: float,
    window_s: float,
    spread_s: float,
    gateway: GatewayProcess | Splice | None = None,
    **request: Any,
) -> Load:
    """Users who send one request after another."""
    loop = asyncio.get_running_loop()
    client = Client(port)
    began_s = loop.time()
    end_s = began_s + warm_up_s + window_s

    async def user(index: int) -> None:
        await asyncio.sleep(spread_s * index / users)
        while loop.time() < end_s:
            await client.complete(**request)

    async def measure() -> tuple[float, float]:
        await asyncio.sleep(warm_up_s)
        before_s = gateway.cpu_s() if gateway else math.nan
        await asyncio.sleep(window_s)
        return (gateway.cpu_s() - before_s, gateway.resident_mb()) if gateway else (math.nan, math.nan)

    measured = asyncio.create_task(measure())
    await asyncio.gather(*(user(index) for index in range(users)))
    cpu_s, resident_mb = await measured
    client.close()
    start_s = began_s + warm_up_s
    inside = [reply for reply in client.replies if start_s <= reply.sent_s < end_s]
    chunks = sum(start_s <= at_s < end_s for reply in client.replies for at_s in reply.times_s)
    return Load(inside, chunks, window_s, cpu_s, resident_mb)


def _ms(values_s: Sequence[float] | np.ndarray[Any, Any], percentile: float) -> float:
    return float(np.percentile(np.asarray(values_s), percentile)) * 1e3


async def paced(folder: Path, users: Sequence[int], window_s: float) -> None:
    """P1: streams of a chunk every 50 ms."""
    table = Table(title=f"streams of {CHUNKS} chunks, {ITL_S * 1e3:g} ms apart, 200-word prompts")
    for name in ("users", "through", "TTFT p50/p99 ms", "E2E p50/p99 ms", "gap p99 ms", "failed"):
        table.add_column(name)
    for name in ("added TTFT p50/p99", "CPU s/1,000 chunks", "core", "RSS MB"):
        table.add_column(name)
    for count in users:
        direct: tuple[float, float] | None = None
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
                    warm_up_s=CHUNKS * ITL_S + 1,
                    window_s=window_s,
                    spread_s=CHUNKS * ITL_S,
                    gateway=gateway,
                    prompt=prompt_of(200),
                    max_tokens=CHUNKS,
                )
            ttfts_s = [reply.ttft_s for reply in load.replies]
            took_s = [reply.took_s for reply in load.replies]
            gaps_s = np.concatenate([np.diff(reply.times_s) for reply in load.replies])
            figures = (_ms(ttfts_s, 50), _ms(ttfts_s, 99))
            direct = direct or figures
            table.add_row(
                str(count),
                through,
                f"{figures[0]:.2f} / {figures[1]:.2f}",
                f"{_ms(took_s, 50):.1f} / {_ms(took_s, 99):.1f}",
                f"{_ms(gaps_s, 99):.1f}",
                str(load.failed()),
                f"{figures[0] - direct[0]:.2f} / {figures[1] - direct[1]:.2f}",
                f"{load.cpu_s / load.chunks * 1e3:.4f}",
                f"{load.cpu_s / load.window_s:.2f}",
                f"{load.resident_mb:.0f}",
            )
    console.print(table)


async def requests(folder: Path, window_s: float) -> None:
    """P2: answers of one chunk, as many as one core gives."""
    table = Table(title="answers of one chunk, 32 users")
    for name in ("prompt", "through", "requests/s", "CPU ms a request", "failed"):
        table.add_column(name)
    for words, policy in ((5, "round_robin"), (500, "class")):
        for through in ("direct", "gateway"):
            expert = Expert("code")
            os.sched_setaffinity(expert.pid, {0})
            config = config_for({"code": [expert.url]}, router={"policy": policy})
            gateway = GatewayProcess(config, folder) if through == "gateway" else None
            if gateway is not None:
                pin(gateway, {1})
            with running(*([gateway] if gateway else []), expert):
                load = await closed_loop(
                    gateway.port if gateway else expert.port,
                    32,
                    warm_up_s=1,
                    window_s=window_s,
                    spread_s=0,
                    gateway=gateway,
                    prompt=prompt_of(words),
                    max_tokens=1,
                    stream=False,
                )
            rate_rps = len(load.replies) / load.window_s
            cpu_ms = load.cpu_s / len(load.replies) * 1e3
            label = f"{words} words, {policy}"
            table.add_row(label, through, f"{rate_rps:,.0f}", f"{cpu_ms:.3f}", str(load.failed()))
    console.print(table)


async def workers(folder: Path, window_s: float) -> None:
    """P5: two processes on one port, with client and experts on the same two cores."""
    table = Table(title="one chunk, 64 users, workers share both cores with client and expert")
    for name in ("workers", "requests/s", "CPU ms a request", "most at the expert (cap 16)", "failed"):
        table.add_column(name)
    for count in (1, 2):
        expert = Expert("code")
        limits = {"max_in_flight_per_replica": 16}
        router = {"policy": "round_robin", "workers": count}
        gateway = GatewayProcess(config_for({"code": [expert.url]}, router=router, limits=limits), folder)
        with running(gateway, expert):
            load = await closed_loop(
                gateway.port,
                64,
                warm_up_s=1,
                window_s=window_s,
                spread_s=0,
                gateway=gateway,
                prompt=prompt_of(5),
                max_tokens=1,
                stream=False,
            )
            most = expert.state()["running_max"]
        rate_rps, cpu_ms = len(load.replies) / load.window_s, load.cpu_s / len(load.replies) * 1e3
        table.add_row(str(count), f"{rate_rps:,.0f}", f"{cpu_ms:.3f}", str(most), str(load.failed()))
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
