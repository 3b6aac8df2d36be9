"""One request to one replica, and its answer: the bytes go on as they come, within four limits of time.

What a connection receives of an answer goes straight to the client's transport, in the same callback: no task wakes up
and nothing goes through a queue. When the client reads too slowly, its connection holds the expert's.
"""

import asyncio
from collections.abc import Callable

import httptools

from real.gateway.answer import Answer
from real.gateway.event_stream import EventStream
from real.gateway.replica_connection import ReplicaConnection
from real.gateway.response_body import ChunkedBody, MalformedBodyError, ResponseBody, body_of
from sim.serve_spec import TimeoutSpec

_MOST_HEAD_BYTES = 2**16
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
        "_body",
        "_client",
        "_connection",
        "_deadline_s",
        "_done",
        "_error",
        "_events",
        "_head",
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
        self._head = b""
        self._body: ResponseBody | None = None
        self._pieces: list[bytes] = []
        self._answer: Answer | None = None
        self._events: EventStream | None = None  # while the next byte begins a chunk and an event of a relayed stream
        self._client: asyncio.Transport | None = None
        self._started = self._done = self._paused = False
        self._error: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    def begin(self, wire: bytes) -> None:
        """Send the request."""
        wait_s = min(self._timeouts.first_byte_s, self._timeouts.idle_s)
        self._connection.look_at(min(self._heard_s + wait_s, self._deadline_s))
        self._connection.begin(self, wire)

    # ------------------------------------------------------------------------------------- what the connection calls

    def receive(self, data: bytes) -> None:
        """Take bytes of the answer."""
        if self._events is not None and self._events.is_token(data):
            client = self._client
            assert client is not None
            self._replica.heard_s = self._heard_s = self._loop.time()
            if not client.is_closing():
                client.write(data)
            return
        try:
            self._read(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, MalformedBodyError):
            self.fail("reset")

    def _read(self, data: bytes) -> None:
        body = self._body
        if body is None:
            body, data = self._read_head(data)
            if body is None:
                return
        data = body.feed(data)
        if data:
            self._pieces.append(data)
            self._replica.heard_s = self._heard_s = self._loop.time()
        if body.done:
            self._complete(body)
        elif data:
            self._pass_on()

    def _read_head(self, data: bytes) -> tuple[ResponseBody | None, bytes]:
        """Read on in the head; return the body that follows it, once that is known, and its first bytes."""
        data = self._head + data
        while (end := data.find(b"\r\n\r\n") + 4) > 3:
            self.headers.clear()
            parser = httptools.HttpResponseParser(self)
            parser.feed_data(data[:end])
            data = data[end:]
            self.status = parser.get_status_code()
            if self.status >= 200:  # or else it is an interim answer: the real one follows
                self._connection.stays_open = parser.should_keep_alive()
                self._body = body_of(self.status, self.headers)
                return self._body, data
        if len(data) > _MOST_HEAD_BYTES:
            raise MalformedBodyError
        self._head = data
        return None, b""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header: what the parser calls."""
        self.headers.append((name.lower(), value))

    def _pass_on(self) -> None:
        """Pass on what has come, once the client's answer has begun."""
        answer = self._answer
        if answer is not None:
            answer.write(self.take())
            self._find_events()
        elif not self._started:
            self._started = True
            self._wake()

    def _find_events(self) -> None:
        """See whether the next bytes may be a chunk that can go on as it is."""
        answer, body, events = self._answer, self._body, None
        if answer is not None and answer.is_chunked and isinstance(body, ChunkedBody) and body.between:
            events = answer.events
        self._events = events if events is not None and events.is_between else None

    def _complete(self, body: ResponseBody) -> None:
        """End well; the connection is free for the next request."""
        self._done = self._started = True
        self._events = None
        connection = self._connection
        connection.exchange = None
        if connection.stays_open and not self._paused and not body.rest:
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
        self._events = None
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
        if not self._started and not self._done:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            raise UpstreamError(self._error)

    @property
    def is_done(self) -> bool:
        """Whether the answer has ended."""
        return self._done

    def take(self) -> bytes:
        """Return what has come of the body so far and has not been passed on."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return data

    async def relay(self, answer: Answer) -> None:
        """Pass the body on until its end; what comes last of all is left to be taken.

        Raises:
            UpstreamError: it did not end well.
        """
        client = answer.connection
        client.on_pause, client.on_resume = self._pause, self._resume
        self._client = client.transport
        self._answer = answer
        if client.writing_paused:
            self._pause()
        if not self._done:
            self._find_events()
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            raise UpstreamError(self._error)

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
