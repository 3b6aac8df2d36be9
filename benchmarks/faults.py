"""Faults at full size, which take longer than a test may: ``python -m benchmarks.faults [WHAT ...]``.

``deaths``: one of four experts is killed while 1,000 streams are open. ``drain``: the gateway is told to stop while 200
streams are open of which none ends within its 30 s. ``chaos``: 60 s of everything at once, in lives of 10 s that each
end with a drain. ``soak``: 30 minutes of 200 users with a fault in each, only when named.

Every figure stands beside what is asked of it; the exit status is 1 when one is missed. Whatever a request comes to is
held against three ledgers, and one that is not accounted for ends the run at once.
"""

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console

from tests.kit.chaos import CHAOS_TIMEOUTS, Chaos, chaos_scene
from tests.kit.client import Client
from tests.kit.deaths import kill_one_of_four
from tests.kit.processes import CLASSES, Footprint, footprint, until
from tests.kit.scene import Scene, scene

console = Console(width=160)


class Findings:
    """What was found beside what was asked.

    Attributes:
        missed: how many figures are not what was asked.
    """

    def __init__(self) -> None:
        self.missed = 0

    def say(self, what: str, found: str, asked: str = "", *, ok: bool = True) -> None:
        """Print one figure."""
        self.missed += not ok
        verdict = f"   (asked: {asked}{'' if ok else ' - MISSED'})" if asked else ""
        console.print(f"{what}: {found}{verdict}", highlight=False)


def client_of(fleet: Scene) -> Client:
    """A client whose replies are in the fleet's ledger."""
    client = Client(fleet.gateway.port)
    client.replies = fleet.replies
    return client


async def deaths(folder: Path, findings: Findings, arguments: argparse.Namespace) -> None:
    """G2: kill one of four experts."""
    tokens = 200
    with scene(folder, dict.fromkeys(CLASSES, 1), {"ttft_s": 0.05, "itl_s": 0.05}) as fleet:
        client = client_of(fleet)
        death = await kill_one_of_four(fleet, client, arguments.streams, tokens)
        client.close()
        fleet.check_ledger()
    whole = sum(reply.outcome == "completed" and reply.body.count(b'"text"') == tokens for reply in death.others)
    first, *_ = death.asked
    slowest_ms = max(line["took_s"] for line in death.asked) * 1e3
    refused = all(line["status"] in (502, 503) and int(line["retry_after"]) >= 1 for line in death.asked)
    findings.say(
        "G2 streams of the other three, whole", f"{whole} of {len(death.others)}", "all", ok=whole == len(death.others)
    )
    findings.say(
        "G2 streams of the dead one with exactly one error event",
        f"{death.told} of {len(death.dead)}",
        "all",
        ok=death.told == len(death.dead),
    )
    findings.say("G2 all told within", f"{death.told_within_s * 1e3:.0f} ms", "1 s", ok=death.told_within_s <= 1)
    findings.say(
        "G2 next request for it",
        f"{first['status']}, Retry-After {first['retry_after']}, in {first['took_s'] * 1e3:.0f} ms",
        "503 and Retry-After in 50 ms",
        ok=refused and first["took_s"] <= 0.05,
    )
    told_before = f"{death.inside_s * 1e3:.0f} ms, in which {death.told_before} streams were told"
    findings.say("G2 of that, from its arrival in the gateway", told_before)
    findings.say(f"G2 slowest of {len(death.asked)} such requests in the first second", f"{slowest_ms:.0f} ms")


async def drain(folder: Path, findings: Findings, arguments: argparse.Namespace) -> None:
    """G10: streams that outlast the drain."""
    drain_s, streams = arguments.drain_s, 200
    with scene(folder, behaviour={"itl_s": 0.05}, drain_s=drain_s) as fleet:
        client = client_of(fleet)
        tasks = [
            asyncio.create_task(client.complete("code", max_tokens=10**6, timeout_s=drain_s + 60))
            for _ in range(streams)
        ]
        await until(lambda: fleet.experts["code"][0].state()["running"] == streams)
        fleet.gateway.signal(signal.SIGTERM)
        told_s = time.monotonic()
        while (await client.request("/ready")).status == 200:
            pass
        unready_ms = (time.monotonic() - told_s) * 1e3
        replies = await asyncio.gather(*tasks)
        status = await asyncio.to_thread(fleet.gateway.process.wait)
        exit_s = time.monotonic() - told_s
        client.close()
        fleet.check_ledger()
    told = sum((reply.end, reply.errors, reply.is_done) == ("clean", 1, True) for reply in replies)
    ends_s = [reply.ended_s - told_s for reply in replies]
    findings.say("G10 /ready says 503 after", f"{unready_ms:.0f} ms", "100 ms", ok=unready_ms <= 100)
    findings.say("G10 streams with exactly one error event", f"{told} of {streams}", "all", ok=told == streams)
    findings.say(
        "G10 told after", f"{min(ends_s):.2f} to {max(ends_s):.2f} s", f"{drain_s:g} s", ok=min(ends_s) >= drain_s
    )
    findings.say(
        "G10 exit",
        f"status {status} after {exit_s:.2f} s",
        f"0 within {drain_s:g} + 1 s",
        ok=status == 0 and exit_s <= drain_s + 1,
    )


async def chaos(folder: Path, findings: Findings, arguments: argparse.Namespace) -> None:
    """G16: everything at once."""
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    findings.say("G16 seed", str(seed))
    with chaos_scene(folder) as fleet:
        client = client_of(fleet)
        trouble = Chaos(fleet, client, seed)
        lives = [await trouble.life(1, 10.0) for _ in range(max(1, round(arguments.seconds / 10)))]
        client.close()
        outcomes = fleet.check_ledger()
    findings.say("G16 done", str(dict(trouble.done)))
    findings.say("G16 requests", f"{dict(outcomes)}, unaccounted 0", "unaccounted 0")
    files = max(after.files - before.files for before, after in lives)
    grown_mb = max(after.resident_mb - before.resident_mb for before, after in lives)
    findings.say(f"G16 in {len(lives)} lives, most files left open", f"{files:+d}", "0", ok=files <= 0)
    findings.say("G16 most memory left over in one of them", f"{grown_mb:+.1f} MB")


async def soak(folder: Path, findings: Findings, arguments: argparse.Namespace) -> None:
    """G17: users, a fault each minute, memory and files."""
    warm_up_s = 60 * min(5.0, arguments.minutes / 3)
    with scene(folder, dict.fromkeys(CLASSES, 2), {"ttft_s": 0.05, "itl_s": 0.02}, timeouts=CHAOS_TIMEOUTS) as fleet:
        loop = asyncio.get_running_loop()
        gateway, client = fleet.gateway, client_of(fleet)
        trouble = Chaos(fleet, client, seed=1)
        began_s = loop.time()
        end_s = began_s + 60 * arguments.minutes
        samples: list[tuple[float, Footprint]] = []
        await asyncio.gather(*(client.complete(name) for name in CLASSES))
        idle = footprint(gateway)

        async def user(index: int) -> None:
            while loop.time() < end_s:
                reply = await client.complete(CLASSES[index % 4], max_tokens=100)
                client.replies.remove(reply)
                fleet.settled.append(reply.settled)
                await asyncio.sleep(0.5)

        async def faults() -> None:
            while loop.time() < end_s - 60:
                await asyncio.sleep(30)
                await (trouble.kill if trouble.draw.random() < 0.5 else trouble.stop)()
                await asyncio.sleep(30)
                await trouble.recover()
                console.print(f"{(loop.time() - began_s) / 60:5.1f} min: {footprint(gateway)}", highlight=False)

        async def watch() -> None:
            while loop.time() < end_s:
                await asyncio.sleep(5)
                samples.append((loop.time() - began_s, footprint(gateway)))

        await asyncio.gather(faults(), watch(), *(user(index) for index in range(arguments.users)))
        await trouble.quiet()
        client.close()
        await until(lambda: footprint(gateway).files <= idle.files)
        outcomes = fleet.check_ledger()
    late = [(at_s / 60, held) for at_s, held in samples if at_s > warm_up_s]
    minutes = [at for at, _ in late]
    slope_mb = np.polyfit(minutes, [held.resident_mb for _, held in late], 1)[0]
    files = [held.files for _, held in late]
    findings.say("G17 requests", f"{dict(outcomes)}, unaccounted 0", "unaccounted 0")
    findings.say(
        f"G17 memory after the first {warm_up_s / 60:.1f} minutes",
        f"{late[0][1].resident_mb:.1f} to {late[-1][1].resident_mb:.1f} MB, {slope_mb:+.2f} MB a minute",
        "below 1 MB a minute",
        ok=slope_mb < 1,
    )
    findings.say(
        "G17 files open under load", f"{min(files)} to {max(files)}; after it as before it, {idle.files}", "constant"
    )


WHAT: dict[str, Callable[[Path, Findings, argparse.Namespace], Coroutine[Any, Any, None]]] = {
    "deaths": deaths,
    "drain": drain,
    "chaos": chaos,
    "soak": soak,
}


def main() -> None:
    """Do what is asked for; all but soak by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", choices=[*WHAT, []], help="default: deaths drain chaos")
    parser.add_argument("--streams", type=int, default=1000, help="of deaths; default 1000")
    parser.add_argument("--drain-s", type=float, default=30.0, help="of drain; default 30")
    parser.add_argument("--seconds", type=float, default=60.0, help="of chaos; default 60")
    parser.add_argument("--seed", type=int, help="of chaos; default: another each time")
    parser.add_argument("--minutes", type=float, default=30.0, help="of soak; default 30")
    parser.add_argument("--users", type=int, default=200, help="of soak; default 200")
    arguments = parser.parse_args()
    findings = Findings()
    for what in arguments.what or ["deaths", "drain", "chaos"]:
        with tempfile.TemporaryDirectory() as folder:
            uvloop.run(WHAT[what](Path(folder), findings, arguments))
    sys.exit(findings.missed > 0)


if __name__ == "__main__":
    main()
