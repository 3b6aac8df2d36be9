"""Active checks: ``/health`` of every replica, each worker on its own, once an interval."""

import asyncio
from collections.abc import Callable

from real.gateway.exchange import UpstreamError
from real.gateway.replicas import Replica
from real.gateway.upstream import Upstream
from sim.replica_health import State
from sim.serve_spec import HealthSpec


class HealthChecks:
    """Checks replicas and tells of those whose state has changed."""

    def __init__(
        self, replicas: list[Replica], upstream: Upstream, spec: HealthSpec, on_check: Callable[[Replica], None]
    ) -> None:
        """``on_check`` is told each replica after each check, with its state up to date."""
        self._replicas = replicas
        self._upstream = upstream
        self._spec = spec
        self._on_check = on_check
        self._clock = asyncio.get_running_loop().time

    async def first(self) -> None:
        """Take every replica for what it is now."""
        asked = (self._upstream.healthy(replica, self._spec.interval_s) for replica in self._replicas)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for replica, ok in zip(self._replicas, answers, strict=True):
            replica.health.begin(ok is True)
            self._on_check(replica)

    async def run(self) -> None:
        """Check for ever."""
        async with asyncio.TaskGroup() as group:
            for replica in self._replicas:
                group.create_task(self._watch(replica))

    async def _watch(self, replica: Replica) -> None:
        interval_s = self._spec.interval_s
        due_s = self._clock()
        while True:
            due_s = max(due_s + interval_s, self._clock())
            await asyncio.sleep(due_s - self._clock())
            try:
                ok = await self._upstream.healthy(replica, interval_s)
            except UpstreamError:
                continue  # no file descriptor is left to ask with, which says nothing about the replica
            if ok is None:  # no answer in time counts as one while the replica is busy sending others
                ok = self._clock() - replica.heard_s < interval_s and replica.health.state is not State.OUT
            replica.health.checked(ok, self._clock())
            self._on_check(replica)
