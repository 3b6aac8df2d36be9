"""The way to the experts: requests sent on connections that are kept open, and health checks on ones of their own."""

import asyncio
import errno
import math
from collections import deque
from typing import Self

from real.gateway.exchange import Exchange, UpstreamError
from real.gateway.replica_connection import ReplicaConnection
from real.gateway.replicas import Replica
from sim.serve_spec import TimeoutSpec

_GRACE_TURNS = 10
"""When a connection has not come about in time, the loop gets some more turns before the expert is blamed: see
``exchange``."""

IDLE_CONNECTION_S = 3.0
"""How long a connection is kept without a request: less than the 5 s after which vLLM's server closes it."""


class Upstream:
    """Connections to all replicas."""

    def __init__(self, timeouts: TimeoutSpec) -> None:
        self._timeouts = timeouts
        self._idle: dict[Replica, deque[ReplicaConnection]] = {}
        self._loop = asyncio.get_running_loop()

    async def send(self, replica: Replica, path: bytes, headers: bytes, body: bytes, deadline_s: float) -> Exchange:
        """Send a request and wait for its answer's first body byte (or end).

        Raises:
            UpstreamError: there is none.
        """
        head = b"POST %b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n"
        wire = head % (path, replica.address.encode(), headers, len(body)) + body
        connection = self._kept(replica) or await self._connect(replica, self._timeouts.connect_s)
        exchange = Exchange(connection, self._timeouts, deadline_s, self._keep)
        exchange.begin(wire)
        try:
            await exchange.began()
        except asyncio.CancelledError:
            exchange.close()
            raise
        return exchange

    async def healthy(self, replica: Replica, timeout_s: float) -> bool | None:
        """Whether a replica calls itself healthy, on a connection of its own; None when it does not say in time.

        Raises:
            UpstreamError: ``no_descriptor``: it could not be asked.
        """
        self._close_old(replica)
        try:
            connection = await self._connect(replica, min(timeout_s, self._timeouts.connect_s))
            limits = self._timeouts.model_copy(update={"first_byte_s": timeout_s})
            exchange = Exchange(connection, limits, math.inf, ReplicaConnection.abort)
            wire = f"GET /health HTTP/1.1\r\nhost: {replica.address}\r\nconnection: close\r\n\r\n"
            exchange.begin(wire.encode())
            try:
                await exchange.began()
            finally:
                exchange.close()
        except UpstreamError as error:
            if error.kind == "no_descriptor":
                raise
            return None if error.kind == "first_byte_timeout" else False
        return exchange.status == 200

    async def _connect(self, replica: Replica, longest_s: float) -> ReplicaConnection:
        make = self._loop.create_connection(lambda: ReplicaConnection(replica), replica.host, replica.port)
        connecting = asyncio.ensure_future(make)
        try:
            await asyncio.wait((connecting,), timeout=longest_s)
            for _ in range(_GRACE_TURNS):
                if connecting.done():
                    return connecting.result()[1]
                await asyncio.sleep(0)
        except OSError as error:
            # Our own lack of file descriptors says nothing about the replica.
            ours = error.errno in (errno.EMFILE, errno.ENFILE)
            raise UpstreamError("no_descriptor" if ours else "connect_failed") from None
        except asyncio.CancelledError:
            _give_up(connecting)
            raise
        _give_up(connecting)
        raise UpstreamError("connect_failed")

    def _close_old(self, replica: Replica) -> None:
        """Close the connections that have been idle for too long; the oldest is the first."""
        idle, now_s = self._idle.get(replica), self._loop.time()
        while idle and (idle[0].lost or now_s - idle[0].idle_since_s > IDLE_CONNECTION_S):
            idle.popleft().abort()

    def _kept(self, replica: Replica) -> ReplicaConnection | None:
        """The connection used last, if one is young enough."""
        self._close_old(replica)
        idle = self._idle.get(replica)
        while idle:
            connection = idle.pop()
            if not connection.lost:
                return connection
        return None

    def _keep(self, connection: ReplicaConnection) -> None:
        connection.idle_since_s = self._loop.time()
        self._idle.setdefault(connection.replica, deque()).append(connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()


def _give_up(connecting: "asyncio.Future[tuple[asyncio.Transport, ReplicaConnection]]") -> None:
    """Close a connection that nobody waits for any more, should it still come about."""

    def close(done: "asyncio.Future[tuple[asyncio.Transport, ReplicaConnection]]") -> None:
        if not done.cancelled() and done.exception() is None:
            done.result()[0].abort()

    connecting.add_done_callback(close)
    connecting.cancel()
