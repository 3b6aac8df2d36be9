"""Seeded chaos: experts killed, stopped and started again under load while clients come and go; then a quiet point.

A gateway's life ends with a drain, also under load; the next one starts where it was.
"""

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.kit.client import Client
from tests.kit.processes import CLASSES, Expert, Footprint, footprint, until
from tests.kit.scene import Scene, scene

CHAOS_TIMEOUTS = {"first_byte_s": 1.0, "idle_s": 1.0, "queue_s": 2.0}


class Chaos:
    """Troubles of one scene, drawn from one seed."""

    def __init__(self, fleet: Scene, client: Client, seed: int) -> None:
        self.fleet = fleet
        self.client = client
        self.draw = random.Random(seed)
        self.requests: set[asyncio.Task[object]] = set()
        self.down: list[tuple[str, int]] = []
        self.stopped: list[Expert] = []
        self.done: Counter[str] = Counter()

    async def life(self, rounds: int, round_s: float) -> tuple[Footprint, Footprint]:
        """Lead one gateway from its first load through trouble to its drain; return what it held before and after."""
        gateway = self.fleet.gateway
        workers = gateway.workers()
        await self.load()
        await self.quiet()
        before = footprint(gateway)
        for _ in range(rounds):
            await self.round(round_s)
        self.client.close()
        assert gateway.workers() == workers, "a worker has died"
        await until(lambda: footprint(gateway).files <= before.files)
        after = footprint(gateway)
        await self.drain()
        return before, after

    async def drain(self) -> None:
        """End the gateway under load and in trouble: it finishes all or says that it cannot. Start another."""
        gateway = self.fleet.gateway
        received = gateway.total("requests_received_total")
        for _ in range(20):
            self.send()
        await until(lambda: gateway.total("requests_received_total") == received + 20)
        await self.kill()
        gateway.signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.process.wait) == 0
        await asyncio.gather(*self.requests)
        self.requests.clear()
        self.done["drain"] += 1
        await self.recover()
        await until(lambda: all(expert.state()["running"] == 0 for expert in self.fleet.all))
        self.fleet.check_ledger()
        await asyncio.to_thread(self.fleet.restart_gateway)

    async def round(self, seconds: float) -> None:
        """Trouble for some time, everything up again, and a quiet point at which all accounts must agree."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + seconds
        while loop.time() < end_s:
            action = self.draw.choice(("kill", "stop", "restart", "continue_", "load", "load", "leave", "hurt"))
            self.done[action] += 1
            await getattr(self, action)()
            await asyncio.sleep(self.draw.uniform(0.02, 0.15))
        await self.recover()
        await self.quiet()

    async def quiet(self) -> None:
        """Wait for all answers; then nothing may be left over anywhere."""
        await asyncio.gather(*self.requests)
        self.requests.clear()
        gateway = self.fleet.gateway
        await until(
            lambda: gateway.total("open_requests") == gateway.total("inflight") == gateway.total("queue_depth") == 0
        )
        await until(lambda: all(expert.state()["running"] == 0 for expert in self.fleet.all))
        self.fleet.check_ledger()

    async def recover(self) -> None:
        while self.stopped:
            await self.continue_()
        while self.down:
            await self.restart()

    def up(self) -> Sequence[tuple[str, int]]:
        return [
            (name, index)
            for name, replicas in self.fleet.experts.items()
            for index, expert in enumerate(replicas)
            if (name, index) not in self.down and expert not in self.stopped
        ]

    async def kill(self) -> None:
        if len(up := self.up()) > 1:
            name, index = self.draw.choice(up)
            self.fleet.experts[name][index].kill()
            self.down.append((name, index))

    async def stop(self) -> None:
        if len(up := self.up()) > 1:
            name, index = self.draw.choice(up)
            self.fleet.experts[name][index].signal(signal.SIGSTOP)
            self.stopped.append(self.fleet.experts[name][index])

    async def restart(self) -> None:
        if self.down:
            name, index = self.down.pop(self.draw.randrange(len(self.down)))
            await asyncio.to_thread(self.fleet.restart, name, index)

    async def continue_(self) -> None:
        if self.stopped:
            self.stopped.pop(self.draw.randrange(len(self.stopped))).signal(signal.SIGCONT)

    async def load(self) -> None:
        for _ in range(self.draw.randrange(20)):
            self.send()

    async def leave(self) -> None:
        for _ in range(self.draw.randrange(5)):
            self.send(leave_after_s=self.draw.uniform(0, 0.3))

    async def hurt(self) -> None:
        fault = self.draw.choice(
            ({"cut_after": 2}, {"end_after": 1}, {"status": 500}, {"status": 400}, {"hang_after": 3})
        )
        self.send(mock=fault)

    def send(self, **fields: object) -> None:
        request = self.client.complete(
            self.draw.choice(CLASSES), max_tokens=self.draw.randrange(1, 30), stream=self.draw.random() < 0.8, **fields
        )
        self.requests.add(asyncio.create_task(request))


@contextlib.contextmanager
def chaos_scene(folder: Path) -> Iterator[Scene]:
    """Two experts of two replicas each, small caps, and limits that pass soon."""
    limits = {"max_in_flight_per_replica": 20, "max_queued_per_expert": 20}
    behaviour = {"ttft_s": 0.02, "itl_s": 0.01}
    with scene(folder, {"code": 2, "talk": 2}, behaviour, timeouts=CHAOS_TIMEOUTS, limits=limits) as fleet:
        yield fleet
