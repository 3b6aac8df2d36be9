"""Answers on their way to a client: an expert's, passed on as it comes, and the gateway's own."""

import time
from email.utils import formatdate
from http import HTTPStatus

from real.gateway.client_connection import ClientConnection
from real.gateway.error_events import error_event
from real.gateway.event_stream import EventStream
from real.gateway.request_parser import Request

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_OURS = frozenset((b"content-length", b"date", b"server", b"x-request-id"))
_NOT_PASSED_ON = HOP_BY_HOP | _OURS
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_WITHOUT_BODY = frozenset((204, 304))
_LAST_CHUNK = b"0\r\n\r\n"


class _Clock:
    """The Date header, written once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        """Return the header's line."""
        now = int(time.time())
        if now != self._second:
            self._second, self._line = now, b"Date: %b\r\n" % formatdate(now, usegmt=True).encode()
        return self._line


_clock = _Clock()
_status_lines: dict[int, bytes] = {}


def _begin_head(status: int) -> bytes:
    line = _status_lines.get(status)
    if line is None:
        phrase = _PHRASES.get(status, "")
        line = _status_lines[status] = f"HTTP/1.1 {status} {phrase}\r\nServer: expert-router\r\n".encode()
    return line + _clock.line()


def answer_whole(
    connection: ClientConnection, request: Request | None, status: int, body: bytes, headers: dict[str, str]
) -> None:
    """Send an answer of the gateway's own, in JSON; None for what could not be read as a request."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    connection.begin_answer()
    connection.finish(
        b"%bContent-Type: application/json\r\n%bContent-Length: %d\r\n%b\r\n%b"
        % (
            _begin_head(status),
            lines.encode(),
            len(body),
            b"" if connection.stays_open else b"Connection: close\r\n",
            b"" if request is not None and request.method == b"HEAD" else body,
        )
    )


class Answer:
    """An expert's answer to one request.

    Attributes:
        events: follows the stream, when it is one.
        is_chunked: whether the body goes out in chunks.
    """

    __slots__ = ("_last", "_old", "_transport", "connection", "events", "is_chunked")

    def __init__(self, connection: ClientConnection, request: Request) -> None:
        self.connection = connection
        self._transport = connection.transport
        self._old = request.is_old
        self.is_chunked = False
        self.events: EventStream | None = None
        self._last = b""

    def start(self, status: int, own: str, headers: list[tuple[bytes, bytes]], first: bytes, *, whole: bool) -> None:
        """Send status, headers and the body's first bytes in one go.

        Args:
            status: of the expert's answer.
            own: header lines of the gateway's.
            headers: of the expert's answer, names in lower case; those of its connection stay there.
            first: what has come of the body.
            whole: whether that is all of it; then everything goes out with its end.
        """
        dropped = _NOT_PASSED_ON
        for name, value in headers:
            if name == b"connection":
                dropped |= {word.strip().lower() for word in value.split(b",")}
        length: bytes | None = None
        head = [_begin_head(status), own.encode()]
        for name, value in headers:
            if name == b"content-length":
                length = value
            elif name not in dropped:
                head.append(b"%b: %b\r\n" % (name, value))
                if name == b"content-type" and value.startswith(b"text/event-stream"):
                    self.events = EventStream()
        if status in _WITHOUT_BODY:
            pass
        elif self.events is None and length is not None:
            head.append(b"Content-Length: %b\r\n" % length)
        elif self._old:
            self.connection.stays_open = False  # its end is the body's
        else:
            self.is_chunked = True
            head.append(b"Transfer-Encoding: chunked\r\n")
        if not self.connection.stays_open:
            head.append(b"Connection: close\r\n")
        head.append(b"\r\n")
        if self.events is not None:
            first = self.events.whole(first)
        if first:
            head.append(self._framed(first))
        self.connection.begin_answer()
        if whole:
            self._last = b"".join(head)
        else:
            self._transport.write(b"".join(head))

    def write(self, data: bytes) -> None:
        """Pass on bytes of the body. How fast is the caller's care: see ``ClientConnection.on_pause``."""
        if self.events is not None:
            data = self.events.whole(data)
        if data and not self._transport.is_closing():
            self._transport.write(self._framed(data))

    def add_last(self, data: bytes) -> None:
        """Take the last bytes of the body; they go out with its end."""
        if self.events is not None:
            data = self.events.whole(data) + self.events.remainder()
        if data:
            self._last += self._framed(data)

    def end(self) -> None:
        """End the body."""
        self.connection.finish(self._last + _LAST_CHUNK if self.is_chunked else self._last)

    def break_off(self, status: int, message: str) -> None:
        """End an answer that cannot go on: by an error event in a stream, by a cut in anything else."""
        if self.events is not None:
            self._last += self._framed(error_event(status, message))
            self.end()
        else:
            self._transport.abort()

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data
