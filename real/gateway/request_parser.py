"""A client's bytes into requests: llhttp's strict reading, and the limits that it does not know.

What two readers might understand differently is refused: a length given twice or in two ways, any other transfer
coding than ``chunked``, other versions than 1.0 and 1.1, a Host that is missing or there twice. Heads and bodies have
longest lengths.
"""

import asyncio
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httptools

from real.gateway.error_events import Refusal

_MOST_HEAD_BYTES = 32 * 1024
_MOST_HEADERS = 128
_MOST_TARGET_BYTES = 8 * 1024
_MOST_OFFERS = 16
"""Requests in one read that may offer another protocol."""
_LENGTH, _CODING, _EXPECT, _HOST, _UPGRADE = b"content-length", b"transfer-encoding", b"expect", b"host", b"upgrade"
_ONCE = frozenset((_LENGTH, _CODING, _HOST))


class Request:
    """One request. Its body may still be on the way.

    Attributes:
        method: in capitals.
        path: without a query.
        headers: names in lower case; of several of one name, the first.
        body: what has arrived of it.
        arrived_s: when its first byte was read, by ``time.monotonic``.
        is_old: whether it is one of HTTP/1.0, which knows no chunks and one request a connection.
        keep_alive: whether its client may send another one on the same connection.
        is_here: whether all of it has arrived.
    """

    __slots__ = (
        "_error",
        "_waiter",
        "arrived_s",
        "body",
        "headers",
        "is_here",
        "is_old",
        "keep_alive",
        "method",
        "path",
    )

    def __init__(self, arrived_s: float) -> None:
        self.method = b""
        self.path = b""
        self.headers: dict[bytes, bytes] = {}
        self.body: bytes | bytearray = b""
        self.arrived_s = arrived_s
        self.is_old = self.keep_alive = self.is_here = False
        self._error: Refusal | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> str | None:
        """Return a header's value, None when it is not there."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def asks_first(self) -> bool:
        """Whether its client waits to be told to send the body."""
        return _EXPECT in self.headers and self.headers[_EXPECT].lower() == b"100-continue" and not self.is_old

    @property
    def promised_bytes(self) -> int:
        """The length of the body as its head tells it; 0 when it does not."""
        return int(self.headers.get(_LENGTH, 0))

    async def arrive(self) -> None:
        """Wait for the rest of the body.

        Raises:
            Refusal: it is malformed, or too large.
        """
        if not self.is_here and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error

    def end(self, error: Refusal | None = None) -> None:
        """Note that all of it is here, or why the rest is not going to be read."""
        self.is_here = error is None
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def too_large(most_bytes: int) -> Refusal:
    """Return the refusal of a body that is too large."""
    return Refusal("client_error", 413, f"the body may have {most_bytes} bytes at most")


class RequestParser:
    """The requests of one connection, each told of as soon as its head is here.

    Attributes:
        partial: the request whose end has not come yet; None between two requests. Its head may still be on the way.
    """

    __slots__ = (
        "_body_bytes",
        "_head_bytes",
        "_headers",
        "_in_head",
        "_most_body_bytes",
        "_on_request",
        "_other_bytes",
        "_parser",
        "_url",
        "partial",
    )

    def __init__(self, on_request: Callable[[Request], None], most_body_bytes: int) -> None:
        self._on_request = on_request
        self._most_body_bytes = most_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers = self._head_bytes = self._body_bytes = self._other_bytes = 0
        self._in_head = False
        self.partial: Request | None = None

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            Refusal: what came is no request, or too large. Nothing more can be read.
        """
        before = self._body_bytes
        for _ in range(_MOST_OFFERS):
            offered_at = self._feed(data)
            if offered_at is None:
                break
            data = self._without_offer(data[offered_at:])
        else:
            raise _malformed()
        if self.partial is None or self._body_bytes != before:
            self._other_bytes = 0
        else:  # heads, but also what may come along with chunks
            self._other_bytes += len(data)
            if self._other_bytes > _MOST_HEAD_BYTES:
                raise self._too_much_head()

    def _feed(self, data: bytes) -> int | None:
        """Read on; return where it stopped behind a head that offers another protocol."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return int(upgrade.args[0])
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, Refusal):
                raise error.__context__ from None
            raise
        except httptools.HttpParserError:
            raise _malformed() from None
        return None

    def close(self) -> None:
        """Let go of everything: nothing more comes, and the half of a large body must not wait for the collector."""
        self.partial = None
        del self._parser, self._on_request  # each leads back here

    # ----------------------------------------------------------------------------------------- what the parser calls

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._url = b""
        self._headers = self._head_bytes = self._body_bytes = 0
        self._in_head = True
        self.partial = Request(time.monotonic())

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those that follow a chunked body are left out."""
        if not self._in_head:
            return
        assert self.partial is not None
        headers, name = self.partial.headers, name.lower()
        self._headers += 1
        self._head_bytes += len(name) + len(value)
        if name not in headers:
            headers[name] = value
        elif name in _ONCE:
            raise _malformed()

    def on_headers_complete(self) -> None:
        """Look at the head and tell of the request."""
        parser, request = self._parser, self.partial
        assert request is not None
        if parser.should_upgrade():
            return
        self._in_head = False
        if len(self._url) > _MOST_TARGET_BYTES or self._head_bytes > _MOST_HEAD_BYTES or self._headers > _MOST_HEADERS:
            raise self._too_much_head()
        headers, version = request.headers, parser.get_http_version()
        if version == "1.1":
            if _HOST not in headers:
                raise _malformed()
            request.keep_alive = parser.should_keep_alive()
        elif version == "1.0":
            request.is_old = True
        else:
            raise _malformed()
        if _CODING in headers and (request.is_old or _LENGTH in headers or headers[_CODING].lower() != b"chunked"):
            raise _malformed()
        request.method = parser.get_method()
        request.path = _path(self._url)
        self._on_request(request)

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        assert self.partial is not None
        self._body_bytes += len(data)
        if self._body_bytes > self._most_body_bytes:
            raise too_large(self._most_body_bytes)
        if self.partial.body:
            if isinstance(self.partial.body, bytes):
                self.partial.body = bytearray(self.partial.body)
            self.partial.body += data
        else:
            self.partial.body = data

    def on_message_complete(self) -> None:
        """End a request."""
        request = self.partial
        if request is not None and not self._in_head:
            self.partial = None
            request.end()

    def _too_much_head(self) -> Refusal:
        if len(self._url) > _MOST_TARGET_BYTES:
            return Refusal("client_error", 414, f"the path may have {_MOST_TARGET_BYTES} bytes at most")
        message = f"the head may have {_MOST_HEAD_BYTES} bytes and {_MOST_HEADERS} headers at most"
        return Refusal("client_error", 431, message)

    def _without_offer(self, rest: bytes) -> bytes:
        """Return a head that offers another protocol as if it did not, and the rest: nobody has to take up the offer.

        The parser has stopped behind this head, so it is read once more.
        """
        parser, request = self._parser, self.partial
        method = parser.get_method()
        if request is None or not self._in_head or method == b"CONNECT":
            raise _malformed()
        lines = [b"%b: %b\r\n" % (name, value) for name, value in request.headers.items() if name != _UPGRADE]
        line = b"%b %b HTTP/%b\r\n" % (method, self._url, parser.get_http_version().encode())
        self._parser = httptools.HttpRequestParser(self)
        return b"%b%b\r\n%b" % (line, b"".join(lines), rest)


def _path(url: bytes) -> bytes:
    if not url.startswith(b"/"):  # whole, as to a proxy; a host of another is none of our business
        try:
            url = urlsplit(url).path or b"/"
        except ValueError:
            raise _malformed() from None
    return url.partition(b"?")[0]


def _malformed() -> Refusal:
    return Refusal("client_error", 400, "malformed HTTP request")
