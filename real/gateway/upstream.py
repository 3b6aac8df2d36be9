"""The way to the experts: connections kept open, one request at a time on each, and the answers' bytes passed on.

A connection hands what it received of an answer straight to the client's transport, in the same callback: no task
wakes up and nothing goes through a queue. When the client reads too slowly, its connection holds the expert's.
"""

import asyncio
import errno
import math
from collections import deque
from collections.abc import Callable
from typing import Self, cast

import httptools

from real.gateway.answer import Answer
from real.gateway.replicas import Replica
from sim.serve_spec import TimeoutSpec

_GRACE_TURNS = 10
_GRACE_S = 0.02
"""When a limit has passed, the loop gets some more turns before the expert is blamed: a turn looks at its clock before
it looks at its sockets, so after a long turn an answer may lie there that came in time."""

IDLE_CONNECTION_S = 3.0
"""How long a connection is kept without a request: less than the 5 s after which vLLM's server closes it."""


class UpstreamError(Exception):
    """An expert failed a request.

    Attributes:
        kind: ``connect_failed``, ``no_descriptor``, ``reset``, ``first_byte_timeout``, ``idle_timeout`` or
            ``total_timeout``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class Connection(asyncio.Protocol):
    """One connection to a replica."""

    __slots__ = ("exchange", "idle_since_s", "lost", "parser", "replica", "transport")

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.exchange: Exchange | None = None
        self.lost = False
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request under way."""
        self.lost = True
        if self.exchange is not None:
            self.exchange.fail("reset")

    def begin(self, exchange: "Exchange", wire: bytes) -> None:
        """Send a request."""
        self.parser = httptools.HttpResponseParser(exchange)
        self.exchange = exchange
        if self.lost or self.transport.is_closing():  # since it was made, or taken from those kept
            exchange.fail("reset")
        else:
            self.transport.write(wire)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer; without a request, there should be none."""
        exchange = self.exchange
        if exchange is None:
            self.abort()
            return
        try:
            self.parser.feed_data(data)
            exchange.pass_on()
        except httptools.HttpParserError:
            exchange.pass_on()
            exchange.fail("reset")
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        self.lost = True
        self.transport.abort()


class Exchange:
    """One request to one replica, and its answer.

    Attributes:
        status: of the answer.
        headers: of the answer, names in lower case.
    """

    __slots__ = (
        "_answer",
        "_connection",
        "_deadline_s",
        "_done",
        "_error",
        "_heard_s",
        "_loop",
        "_on_free",
        "_paused",
        "_pieces",
        "_replica",
        "_started",
        "_suspected_s",
        "_timeouts",
        "_timer",
        "_waiter",
        "headers",
        "status",
    )

    def __init__(
        self,
        connection: Connection,
        timeouts: TimeoutSpec,
        deadline_s: float,
        on_free: Callable[[Connection], None],
    ) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self._connection = connection
        self._replica = connection.replica
        self._timeouts = timeouts
        self._deadline_s = deadline_s
        self._on_free = on_free
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._suspected_s = -1.0
        self._pieces: list[bytes] = []
        self._answer: Answer | None = None
        self._started = self._done = self._paused = False
        self._error: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer = self._loop.call_at(min(self._heard_s + timeouts.first_byte_s, deadline_s), self._look_at_clock)

    # ------------------------------------------------------------------------------------- what the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """Keep the status."""
        self.status = self._connection.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body until all that has been received is parsed: one write for several chunks."""
        self._pieces.append(data)

    def pass_on(self) -> None:
        """Pass on what has come, once the client's answer has begun."""
        if not self._pieces:
            return
        self._replica.heard_s = self._heard_s = self._loop.time()
        if self._answer is not None:
            self._answer.write(self.take())
        elif not self._started:
            self._started = True
            self._wake()

    def on_message_complete(self) -> None:
        """End well; the connection is free for the next request."""
        if self.status < 200:
            self.headers.clear()  # an interim answer: the real one follows
            return
        self._done = self._started = True
        self._timer.cancel()
        connection = self._connection
        connection.exchange = None
        if connection.parser.should_keep_alive() and not self._paused:
            self._on_free(connection)
        else:
            connection.abort()
        self._wake()

    # -------------------------------------------------------------------------------------------------- what ends it

    def fail(self, kind: str) -> None:
        """End badly."""
        if self._done:
            return
        self._done, self._error = True, kind
        self._timer.cancel()
        self._connection.exchange = None
        self._connection.abort()
        self._wake()

    def close(self) -> None:
        """Be done with it: an answer that has not ended is cancelled at the expert."""
        self.fail("closed")

    def _look_at_clock(self) -> None:
        now_s = self._loop.time()
        if now_s >= self._deadline_s:
            self.fail("total_timeout")
            return
        wait_s = self._timeouts.idle_s if self._started else self._timeouts.first_byte_s
        due_s = (now_s if self._paused else self._heard_s) + wait_s
        if now_s < due_s:
            self._timer = self._loop.call_at(min(due_s, self._deadline_s), self._look_at_clock)
        elif self._suspected_s != self._heard_s:
            self._suspected_s = self._heard_s
            self._timer = self._loop.call_later(_GRACE_S, self._look_at_clock)
        else:
            self.fail("idle_timeout" if self._started else "first_byte_timeout")

    # ----------------------------------------------------------------------------------------- what a request awaits

    async def began(self) -> None:
        """Wait for the first byte of the body, or for an answer without one.

        Raises:
            UpstreamError: there is none.
        """
        while not self._started and not self._done:
            await self._wait()
        self._raise_error()

    def take(self) -> bytes:
        """Return what has come of the body so far."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return data

    async def relay(self, answer: Answer) -> None:
        """Pass the body on until its end.

        Raises:
            UpstreamError: it did not end well.
        """
        client = answer.connection
        client.on_pause, client.on_resume = self._pause, self._resume
        self._answer = answer
        self.pass_on()
        if client.writing_paused:
            self._pause()
        while not self._done:
            await self._wait()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise UpstreamError(self._error)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pause(self) -> None:
        if not self._done and not self._paused:
            self._paused = True
            if not self._connection.transport.is_closing():
                self._connection.transport.pause_reading()

    def _resume(self) -> None:
        if not self._done and self._paused:
            self._paused = False
            self._heard_s = self._loop.time()
            if not self._connection.transport.is_closing():
                self._connection.transport.resume_reading()


class Upstream:
    """Connections to all replicas."""

    def __init__(self, timeouts: TimeoutSpec) -> None:
        self._timeouts = timeouts
        self._idle: dict[Replica, deque[Connection]] = {}
        self._loop = asyncio.get_running_loop()

    async def send(
        self, replica: Replica, path: str, headers: dict[str, str], body: bytes, deadline_s: float
    ) -> Exchange:
        """Send a request and wait for its answer's first body byte (or end).

        Raises:
            UpstreamError: there is none.
        """
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {path} HTTP/1.1\r\nhost: {replica.address}\r\n{lines}content-length: {len(body)}\r\n\r\n"
        connection = self._kept(replica) or await self._connect(replica, self._timeouts.connect_s)
        exchange = Exchange(connection, self._timeouts, deadline_s, self._keep)
        connection.begin(exchange, head.encode("latin-1") + body)
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
            exchange = Exchange(connection, limits, math.inf, Connection.abort)
            wire = f"GET /health HTTP/1.1\r\nhost: {replica.address}\r\nconnection: close\r\n\r\n"
            connection.begin(exchange, wire.encode())
            try:
                await exchange.began()
            finally:
                exchange.close()
        except UpstreamError as error:
            if error.kind == "no_descriptor":
                raise
            return None if error.kind == "first_byte_timeout" else False
        return exchange.status == 200

    async def _connect(self, replica: Replica, longest_s: float) -> Connection:
        make = self._loop.create_connection(lambda: Connection(replica), replica.host, replica.port)
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

    def _kept(self, replica: Replica) -> Connection | None:
        """The connection used last, if one is young enough."""
        self._close_old(replica)
        idle = self._idle.get(replica)
        while idle:
            connection = idle.pop()
            if not connection.lost:
                return connection
        return None

    def _keep(self, connection: Connection) -> None:
        connection.idle_since_s = self._loop.time()
        self._idle.setdefault(connection.replica, deque()).append(connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()


def _give_up(connecting: "asyncio.Future[tuple[asyncio.Transport, Connection]]") -> None:
    """Close a connection that nobody waits for any more, should it still come about."""

    def close(done: "asyncio.Future[tuple[asyncio.Transport, Connection]]") -> None:
        if not done.cancelled() and done.exception() is None:
            done.result()[0].abort()

    connecting.add_done_callback(close)
    connecting.cancel()
