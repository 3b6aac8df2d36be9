"""One request to one replica, and its answer: the bytes go on as they come, within four limits of time.

What a connection receives of an answer goes straight to the client's transport, in the same callback: no task wakes up
and nothing goes through a queue. When the client reads too slowly, its connection holds the expert's.
"""

import asyncio
from collections.abc import Callable

from real.gateway.answer import Answer
from real.gateway.replica_connection import ReplicaConnection
from sim.serve_spec import TimeoutSpec

_GRACE_S = 0.02
"""When a limit has passed, the loop gets some more turns before the expert is blamed: a turn looks at its clock before
it looks at its sockets, so after a long turn an answer may lie there that came in time."""


class UpstreamError(Exception):
    """An expert failed a request.

    Attributes:
        kind: ``connect_failed``, ``no_descriptor``, ``reset``, ``first_byte_timeout``, ``idle_timeout`` or
            ``total_timeout``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


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
        "_waiter",
        "headers",
        "status",
    )

    def __init__(
        self,
        connection: ReplicaConnection,
        timeouts: TimeoutSpec,
        deadline_s: float,
        on_free: Callable[[ReplicaConnection], None],
    ) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._connection = connection
        self._replica = connection.replica
        self._timeouts = timeouts
        self._deadline_s = deadline_s
        self._on_free = on_free
        self._loop = connection.loop
        self._heard_s = self._loop.time()
        self._suspected_s = -1.0
        self._pieces: list[bytes] = []
        self._answer: Answer | None = None
        self._started = self._done = self._paused = False
        self._error: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    def begin(self, wire: bytes) -> None:
        """Send the request."""
        wait_s = min(self._timeouts.first_byte_s, self._timeouts.idle_s)
        self._connection.look_at(min(self._heard_s + wait_s, self._deadline_s))
        self._connection.begin(self, wire)

    # ------------------------------------------------------------------------------------- what the connection calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers.append((name.lower(), value))

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
        connection = self._connection
        connection.exchange = None
        if connection.parser.should_keep_alive() and not self._paused:
            self._on_free(connection)
        else:
            connection.abort()
        self._wake()

    def look_at_clock(self, now_s: float) -> float | None:
        """End if a limit of time has passed; return when to look again, None for never."""
        if now_s >= self._deadline_s:
            self.fail("total_timeout")
            return None
        wait_s = self._timeouts.idle_s if self._started else self._timeouts.first_byte_s
        due_s = (now_s if self._paused else self._heard_s) + wait_s
        if now_s < due_s:
            return min(due_s, self._deadline_s)
        if self._suspected_s != self._heard_s:
            self._suspected_s = self._heard_s
            return now_s + _GRACE_S
        self.fail("idle_timeout" if self._started else "first_byte_timeout")
        return None

    # -------------------------------------------------------------------------------------------------- what ends it

    def fail(self, kind: str) -> None:
        """End badly."""
        if self._done:
            return
        self._done, self._error = True, kind
        self._connection.exchange = None
        self._connection.abort()
        self._wake()

    def close(self) -> None:
        """Be done with it: an answer that has not ended is cancelled at the expert."""
        self.fail("closed")

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
            self._connection.pause()

    def _resume(self) -> None:
        if not self._done and self._paused:
            self._paused = False
            self._heard_s = self._loop.time()
            self._connection.resume()
