"""One client's connection: aiohttp's, with deadlines for those who send or read too slowly, and errors in JSON."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from real.gateway.error_events import error_body
from sim.serve_spec import TimeoutSpec

_log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75.0
_WRITE_BUFFER_BYTES = 2**16
_LATE = error_body(
    408, "headers and body of a request must arrive within the time that serve.timeouts.request_s allows"
)
_LATE_ANSWER = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: "
    + str(len(_LATE)).encode()
    + b"\r\n\r\n"
    + _LATE
)


class ClientConnection(RequestHandler):
    """A connection with a deadline for each request to arrive, and one for a client that stopped reading.

    Attributes:
        was_late: whether it was closed because a request did not arrive in time.
        was_slow: whether it was closed because the client stopped reading.
        on_pause: called when what is not yet sent to the client has become too much; ``on_resume`` when it may go on.
    """

    __slots__ = ("_arrived_s", "_busy", "_deadlines", "_late", "_slow", "on_pause", "on_resume", "was_late", "was_slow")

    def __init__(self, manager: "ClientServer", **settings: Any) -> None:
        super().__init__(manager, **settings)
        self._deadlines = manager.deadlines
        self._arrived_s: float | None = None
        self._busy = False
        self._late: asyncio.TimerHandle | None = None
        self._slow: asyncio.TimerHandle | None = None
        self.was_late = False
        self.was_slow = False
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with the first request's deadline."""
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._expect_request()

    def connection_lost(self, exc: BaseException | None) -> None:
        """End all deadlines."""
        for timer in (self._late, self._slow):
            if timer is not None:
                timer.cancel()
        self._late = self._slow = None
        self.on_pause = self.on_resume = None
        super().connection_lost(exc)

    # ------------------------------------------------------------------------------------------------- requests in

    def data_received(self, data: bytes) -> None:
        """Note when a request begins to arrive."""
        if not self._busy and self._arrived_s is None:
            self._arrived_s = time.monotonic()
            if self._late is None:
                self._expect_request()
        super().data_received(data)

    def _expect_request(self) -> None:
        self._late = self._loop.call_later(self._deadlines.request_s, self._request_is_late)

    def _request_is_late(self) -> None:
        self._late = None
        self.was_late = True
        if self.transport is not None:
            if self._arrived_s is not None or self._busy:
                self.transport.write(_LATE_ANSWER)
            self.transport.close()

    def begin(self) -> float:
        """Note that a request's headers are here; return when it began to arrive, by ``time.monotonic``."""
        arrived_s, self._arrived_s, self._busy = self._arrived_s, None, True
        if self._late is None:  # it came right behind another, so nothing has started its time yet
            self._expect_request()
        return time.monotonic() if arrived_s is None else arrived_s

    def request_is_here(self) -> None:
        """Note that all of a request has arrived."""
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def end(self) -> None:
        """Note that an answer has been written; what is not sent yet must be read in time all the same."""
        self.request_is_here()
        self._busy = False
        self.on_pause = self.on_resume = None
        if self._slow is None and self.transport is not None and (left := self.transport.get_write_buffer_size()):
            self._slow = self._loop.call_later(self._deadlines.slow_reader_s, self._still_unread, left)

    # -------------------------------------------------------------------------------------------------- answers out

    def pause_writing(self) -> None:
        """Hold the answer's source, and give the client some time to read."""
        super().pause_writing()
        if self._slow is not None:
            self._slow.cancel()
        self._slow = self._loop.call_later(self._deadlines.slow_reader_s, self._reader_is_slow)
        if self.on_pause is not None:
            self.on_pause()

    def resume_writing(self) -> None:
        """Let the answer's source go on."""
        super().resume_writing()
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        if self.on_resume is not None:
            self.on_resume()

    def _reader_is_slow(self) -> None:
        self._slow = None
        self.was_slow = True
        if self.transport is not None:
            self.transport.abort()

    def _still_unread(self, left: int) -> None:
        self._slow = None
        if self.transport is not None and self.transport.get_write_buffer_size() >= left:
            self.transport.abort()

    # ------------------------------------------------------------------------------------------------------- errors

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a malformed request, or our own defect, in OpenAI's shape and without details of either."""
        if isinstance(exc, ConnectionError):  # the client left as its answer began: neither
            raise exc
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.error("a request failed by a defect of the gateway", exc_info=exc)
            text = "internal error of the gateway"
        else:
            text = "malformed HTTP request"
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, no other can follow")
        response = web.Response(status=status, body=error_body(status, text), content_type="application/json")
        response.force_close()
        return response


class ClientServer(web.Server):
    """Makes the connections of one listening socket."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        deadlines: TimeoutSpec,
        max_body_bytes: int,
    ) -> None:
        loop = asyncio.get_running_loop()

        def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=max_body_bytes)

        super().__init__(handler, request_factory=request, handler_cancellation=True)
        self.deadlines = deadlines

    def __call__(self) -> ClientConnection:
        """Return the protocol of a new connection."""
        return ClientConnection(
            self,
            loop=self._loop,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=0,
            max_line_size=8190,
            max_field_size=16 * 1024,
        )
