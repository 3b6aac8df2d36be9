"""One client's connection: requests in, one answered after the other, and deadlines for those who send or read slowly.

Each request is answered by a task of its own, made when its head is here and cancelled when its client leaves.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from real.gateway.error_events import Refusal
from real.gateway.request_parser import Request, RequestParser

if TYPE_CHECKING:
    from real.gateway.client_server import ClientServer

_log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75.0
"""How long a connection is kept without a request."""
_LINGER_S = 1.0
"""After its last answer a connection is still read for so long: closed on what it still sends, it would be reset."""
_WRITE_BUFFER_BYTES = 2**16
_LATE = Refusal(
    "request_timeout",
    408,
    "headers and body of a request must arrive within the time that serve.timeouts.request_s allows",
)


class ClientConnection(asyncio.Protocol):
    """A connection with a deadline for each request to arrive, and one for a client that stopped reading.

    Attributes:
        transport: of the connection.
        stays_open: whether another request may follow the one that is being answered.
        was_late: whether it is being closed because a request did not arrive in time.
        was_slow: whether it was closed because the client stopped reading.
        writing_paused: whether what is not yet sent to the client has become too much.
        on_pause: called when it has become too much; ``on_resume`` when it may go on.
    """

    __slots__ = (
        "_begun",
        "_ending",
        "_final",
        "_idle_since_s",
        "_last_words",
        "_late",
        "_look_timer",
        "_loop",
        "_parser",
        "_readable",
        "_request",
        "_server",
        "_slow",
        "_task",
        "_unsent",
        "_waiting",
        "on_pause",
        "on_resume",
        "stays_open",
        "transport",
        "was_late",
        "was_slow",
        "writing_paused",
    )

    transport: asyncio.Transport

    def __init__(self, server: "ClientServer") -> None:
        self._server = server
        self._loop = server.loop
        self._parser = RequestParser(self._arrive, server.most_body_bytes)
        self._request: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: deque[Request] = deque()
        self._last_words: Refusal | None = None
        self._readable = True
        self._begun = self._ending = False
        self._final = b""
        self._idle_since_s = 0.0
        self._unsent = 0
        self._late: asyncio.TimerHandle | None = None
        self._slow: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self.stays_open = True
        self.was_late = self.was_slow = self.writing_paused = False
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with the first request's deadline."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._server.connections.add(self)
        self._late = self._loop.call_later(self._server.deadlines.request_s, self._request_is_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End what is under way."""
        for timer in (self._late, self._slow, self._look_timer):
            if timer is not None:
                timer.cancel()
        self._late = self._slow = self._look_timer = None
        self.on_pause = self.on_resume = None
        self._ending = True
        self._server.connections.discard(self)
        self._parser.close()
        self._waiting.clear()
        self.cancel()

    # ------------------------------------------------------------------------------------------------- requests in

    def data_received(self, data: bytes) -> None:
        """Read requests; what comes after the last one that can be read is thrown away."""
        if not self._readable:
            return
        try:
            self._parser.feed(data)
        except Refusal as refusal:
            self._read_no_more(refusal)
        else:
            if self._waiting:  # no more of them before these have been answered
                self.transport.pause_reading()
        if self._late is not None or self._parser.partial is not None:
            self._watch_arrival()

    def _arrive(self, request: Request) -> None:
        if self._request is None:
            self._begin(request)
        else:
            self._waiting.append(request)

    def _read_no_more(self, refusal: Refusal) -> None:
        """Refuse what could not be read, in its turn."""
        self._readable = False
        partial = self._parser.partial
        if partial is not None and (partial is self._request or partial in self._waiting):
            partial.end(refusal)
        elif self._request is None:
            self._refuse(refusal)
        else:
            self._last_words = refusal

    def _watch_arrival(self) -> None:
        """Start the time of a request that is not all here, end that of one that is."""
        request, partial = self._request, self._parser.partial
        awaited = self._readable and partial is not None and (request is None or request is partial)
        if not awaited:
            if self._late is not None and (request is not None or self._ending):
                self._late.cancel()
                self._late = None
        elif self._late is None and not self._ending:
            self._late = self._loop.call_later(self._server.deadlines.request_s, self._request_is_late)

    def _request_is_late(self) -> None:
        self._late = None
        self.was_late = True
        self._readable = False
        if self._request is not None or self._parser.partial is not None:
            self._refuse(_LATE)
        self.transport.close()

    # -------------------------------------------------------------------------------------------------- answers out

    def _begin(self, request: Request) -> None:
        self._request = request
        self._begun = False
        self.stays_open = request.keep_alive
        self._task = self._loop.create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        try:
            await self._server.handler(request, self)
        except asyncio.CancelledError:
            self.transport.abort()
            self._request = self._task = None  # or else the task and all that it holds would wait for the collector
            raise
        except Exception as error:
            _log.error("a request failed by a defect of the gateway", exc_info=error)
            if self._begun:
                self.transport.abort()
            else:
                self._refuse(Refusal("defect", 500, "internal error of the gateway"))
        self._end()

    def cancel(self) -> None:
        """Break off the request that is being answered."""
        if self._task is not None:
            self._task.cancel()

    def begin_answer(self) -> None:
        """Note that an answer's head is being written; what has not arrived of the request by now is not waited for."""
        self._begun = True
        if self._request is not None and not self._request.is_here:
            self.stays_open = False

    def finish(self, data: bytes) -> None:
        """Send the end of the answer, as soon as the request has been accounted for."""
        self._final = data

    def _flush(self) -> None:
        data, self._final = self._final, b""
        if data and not self.transport.is_closing():
            self.transport.write(data)

    def _end(self) -> None:
        """Go on to the next request; what is not sent yet must be read in time all the same."""
        self._request = self._task = None
        self.on_pause = self.on_resume = None
        if self._ending or self.transport.is_closing():
            return
        self._flush()
        self._unsent = self.transport.get_write_buffer_size()
        self._idle_since_s = self._loop.time()
        if not self.stays_open:
            self._leave()
            return
        if self._look_timer is None:
            self._look_timer = self._loop.call_later(self._server.look_s, self._look)
        if self._waiting:
            self._begin(self._waiting.popleft())
            if not self._waiting:
                self.transport.resume_reading()
        elif self._last_words is not None:
            self._refuse(self._last_words)
        if self._parser.partial is not None:
            self._watch_arrival()

    def _refuse(self, refusal: Refusal) -> None:
        """Say what could not be read, as the last thing."""
        self.stays_open = False
        self._server.refuse(self, self._request, refusal)
        self._flush()
        if self._request is None:
            self._leave()

    def _leave(self) -> None:
        """Close once the client has got everything, without resetting a client that still sends."""
        if not self._ending and not self.transport.is_closing():
            self._ending = True
            self._readable = False
            self._idle_since_s = self._loop.time()
            self.transport.resume_reading()
            self.transport.write_eof()
            for timer in (self._late, self._look_timer):
                if timer is not None:
                    timer.cancel()
            self._late = None
            self._look_timer = self._loop.call_later(_LINGER_S, self._look)

    def _look(self) -> None:
        """Look whether a client without a request has been silent, or has not read its answer, for too long."""
        self._look_timer = None
        if self._request is not None:
            return
        idle_s = self._loop.time() - self._idle_since_s
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            if unsent >= self._unsent and idle_s >= self._server.deadlines.slow_reader_s:
                self.transport.abort()
                return
        elif self._ending or idle_s >= KEEP_ALIVE_S:
            self.transport.close()
            return
        after_s = _LINGER_S if self._ending else min(self._server.look_s, max(0.0, KEEP_ALIVE_S - idle_s))
        self._look_timer = self._loop.call_later(after_s, self._look)

    def shut(self) -> None:
        """Close at the end of the gateway's life."""
        self._readable = False
        self.transport.close()

    def pause_writing(self) -> None:
        """Hold the answer's source, and give the client some time to read."""
        self.writing_paused = True
        if self._slow is not None:
            self._slow.cancel()
        self._slow = self._loop.call_later(self._server.deadlines.slow_reader_s, self._reader_is_slow)
        if self.on_pause is not None:
            self.on_pause()

    def resume_writing(self) -> None:
        """Let the answer's source go on."""
        self.writing_paused = False
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        if self.on_resume is not None:
            self.on_resume()

    def _reader_is_slow(self) -> None:
        self._slow = None
        self.was_slow = True
        self.transport.abort()
