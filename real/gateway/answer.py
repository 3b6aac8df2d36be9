"""One answer on its way to a client: head and body bytes as they come from an expert, and what the gateway adds."""

from collections.abc import Iterable

from aiohttp import web

from real.gateway.client_connection import ClientConnection
from real.gateway.error_events import error_event
from real.gateway.event_stream import EventStream

HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
_OURS = frozenset(("content-length", "date", "server", "x-request-id"))


class _Response(web.StreamResponse):
    """One whose headers wait for the first bytes, so that both go out in one write."""

    _send_headers_immediately = False  # as in web.Response; without it, headers would go out on their own


class Answer:
    """The answer to one request; nothing is sent before ``start``.

    Attributes:
        started: whether the client has got a byte.
        events: follows the stream, when it is one.
    """

    __slots__ = ("_chunked", "_own_headers", "_request", "_response", "_transport", "connection", "events", "started")

    def __init__(self, request: web.BaseRequest, own_headers: dict[str, str]) -> None:
        assert isinstance(request.protocol, ClientConnection)
        self._request = request
        self._own_headers = own_headers
        self.connection = request.protocol
        self.started = False
        self.events: EventStream | None = None

    async def start(self, status: int, headers: Iterable[tuple[str, str]], first: bytes) -> web.StreamResponse:
        """Send status, headers (the expert's but for those of its connection, and ours) and the body's first bytes."""
        headers = list(headers)
        named = {word.strip().lower() for name, value in headers if name == "connection" for word in value.split(",")}
        response = _Response(status=status, headers=self._own_headers)
        length = None
        for name, value in headers:
            if name == "content-length":
                length = int(value)
            if name not in HOP_BY_HOP and name not in _OURS and name not in named:
                response.headers.add(name, value)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            self.events = EventStream()
        elif length is not None:
            response.content_length = length
        writer = await response.prepare(self._request)
        assert writer is not None
        self.started = True
        self._response = response
        self._chunked = response.headers.get("transfer-encoding") == "chunked"
        self._transport = self._request.transport
        if self.events is not None:
            first = self.events.whole(first)
        if first:
            await writer.write(first)
        else:
            writer.send_headers()
        return response

    def write(self, data: bytes) -> None:
        """Pass on bytes of the body. How fast is the caller's care: see ``ClientConnection.on_pause``."""
        if self.events is not None:
            data = self.events.whole(data)
            if not data:
                return
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end_of_body(self) -> None:
        """Pass on what follows the last whole event."""
        if self.events is not None and (rest := self.events.remainder()):
            self._write(rest)

    def break_off(self, status: int, message: str) -> None:
        """End an answer that cannot go on: by an error event in a stream, by a cut in anything else."""
        if self.events is not None:
            self._write(error_event(status, message))
        elif self._transport is not None:
            self._transport.abort()
