"""The HTTP side of real users: thousands of streamed completions from one process, each chunk with its time.

Built on ``asyncio.Protocol`` and httptools (the parser that vLLM's own server uses) rather than on a client library,
because a chunk must cost microseconds: with the client on the same machine as what it measures, its work is taken from
that. A chunk is looked at as bytes; JSON is parsed once an answer, for its usage.

First token is the first chunk with a choice, as in vLLM's load generator. An error event fails the request although
``[DONE]`` follows, and so does an answer that ends without ``[DONE]``.
"""

import asyncio
import json
import ssl
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from time import monotonic
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from sim.serve_spec import TimeoutSpec

IDLE_CONNECTION_S = 2.0
"""A connection unused for longer is not used again: servers close idle ones, uvicorn after 5 s, and a request sent into
a closing connection would count as the server's failure."""
PATIENCE_S = 10.0
"""How much longer than the gateway a user waits, so that it is the gateway's own time-out that a request sees."""
SWEEP_S = 0.5
MAX_EVENT_BYTES = 2**22
KEPT_HEADERS = frozenset({b"retry-after", b"x-request-id"})
GATEWAY_HEADER = b"x-expert-router-"


class Exchange:
    """One request and what came back; times are ``time.monotonic()``, NaN where not reached.

    Attributes:
        sent_s: when its first byte was due to leave, before a connection was looked for.
        chunk_s: when each chunk with a token arrived.
        ended_s: when the answer was complete or had failed.
        status: of HTTP; 0 before an answer.
        failure: what went wrong, a few words that group alike failures; empty for a good answer.
        detail: the message with it.
        headers: of the answer, lower case: the gateway's own, ``retry-after`` and ``x-request-id``.
        usage: of the answer, as the engine sent it; None without.
        context: the sender's own; the client does not look at it.
    """

    __slots__ = ("chunk_s", "context", "detail", "ended_s", "failure", "headers", "on_end", "sent_s", "status", "usage")

    def __init__(self, on_end: "Callable[[Exchange], None]", context: Any = None):
        self.on_end = on_end
        self.context = context
        self.sent_s = nan
        self.chunk_s = array("d")
        self.ended_s = nan
        self.status = 0
        self.failure = ""
        self.detail = ""
        self.headers: dict[str, str] = {}
        self.usage: dict[str, Any] | None = None

    @property
    def first_token_s(self) -> float:
        """When the first chunk arrived."""
        return self.chunk_s[0] if self.chunk_s else nan

    @property
    def last_token_s(self) -> float:
        """When the last chunk with a token arrived."""
        return self.chunk_s[-1] if self.chunk_s else nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a user waits for the first token, between two tokens, and in all."""

    connect_s: float
    first_token_s: float
    idle_s: float
    total_s: float


def patience(timeouts: TimeoutSpec) -> Patience:
    """Return a little more patience than the gateway has with the expert."""
    return Patience(
        connect_s=timeouts.connect_s + PATIENCE_S,
        first_token_s=timeouts.queue_s + timeouts.first_byte_s + PATIENCE_S,
        idle_s=timeouts.idle_s + PATIENCE_S,
        total_s=timeouts.total_s + PATIENCE_S,
    )


class LoadClient:
    """Sends streamed completion requests to one server over as many connections as are needed.

    Attributes:
        active: exchanges that have not ended, in order of sending.
    """

    def __init__(self, url: str, patience: Patience, *, api_key: str | None = None):
        """Prepare a client inside a running event loop; nothing is connected.

        Raises:
            ValueError: for something that is not an ``http`` or ``https`` URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url {url}: expected a URL such as http://127.0.0.1:8080")
        self._loop = asyncio.get_running_loop()
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._patience = patience
        path = parts.path.rstrip("/").removesuffix("/v1")
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        head = (
            f"POST {path}/v1/completions HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n"
            f"Content-Type: application/json\r\nAccept: text/event-stream\r\n{key}x-request-id: "
        )
        self._head = head.encode("latin-1")
        self._idle: list[_Connection] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self.active: dict[Exchange, _Connection | None] = {}
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        self._closed = False

    def send(self, body: bytes, request_id: str, on_end: Callable[[Exchange], None], context: Any = None) -> Exchange:
        """Send a request now; ``on_end`` is called once with the exchange, unless it is cancelled."""
        exchange = Exchange(on_end, context)
        data = b"%b%b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, request_id.encode("latin-1"), len(body), body)
        exchange.sent_s = now_s = monotonic()
        while self._idle:
            connection = self._idle.pop()
            if now_s - connection.idle_since_s < IDLE_CONNECTION_S and connection.is_open:
                self.active[exchange] = connection
                connection.start(exchange, data)
                return exchange
            connection.close()
        self.active[exchange] = None
        task = self._loop.create_task(self._connect_and_send(exchange, data))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return exchange

    def cancel_all(self) -> None:
        """Leave every answer that has not ended, as a user who closes the window does."""
        for exchange, connection in list(self.active.items()):
            del self.active[exchange]
            if connection is not None:
                connection.close()
        for task in list(self._connecting):
            task.cancel()

    def close(self) -> None:
        """Cancel everything and close every connection."""
        self._closed = True
        self._sweeper.cancel()
        self.cancel_all()
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect_and_send(self, exchange: Exchange, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._patience.connect_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self), self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            self.end(exchange, "connect timeout", f"no connection in {self._patience.connect_s:g} s")
            return
        except OSError as error:
            self.end(exchange, "connection refused", str(error))
            return
        if exchange not in self.active:
            connection.close()
            return
        self.active[exchange] = connection
        connection.start(exchange, data)

    def release(self, connection: "_Connection") -> None:
        """Keep a connection for the next request."""
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)

    def end(self, exchange: Exchange, failure: str, detail: str = "") -> None:
        """End an exchange, once."""
        if exchange not in self.active:
            return
        del self.active[exchange]
        exchange.failure, exchange.detail = failure, detail
        exchange.ended_s = monotonic()
        exchange.on_end(exchange)

    def _sweep(self) -> None:
        """Give up on answers that take too long; one look at all of them costs less than a timer a chunk."""
        now_s = monotonic()
        limits = self._patience
        for exchange, connection in list(self.active.items()):
            failure = ""
            if now_s - exchange.sent_s > limits.total_s:
                failure = "total timeout"
            elif not exchange.chunk_s:
                if now_s - exchange.sent_s > limits.first_token_s:
                    failure = "first token timeout"
            elif now_s - exchange.chunk_s[-1] > limits.idle_s:
                failure = "idle timeout"
            if failure and connection is not None:
                connection.close()
                self.end(exchange, failure)
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)


class _Connection(asyncio.Protocol):
    """One keep-alive connection, with at most one exchange at a time."""

    def __init__(self, client: LoadClient):
        self._client = client
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._rest = b""
        self._body = bytearray()
        self._done = False
        self._streamed = False
        self._now_s = nan
        self.idle_since_s = nan

    @property
    def is_open(self) -> bool:
        """Whether it can carry another request."""
        return self._transport is not None and not self._transport.is_closing()

    def start(self, exchange: Exchange, data: bytes) -> None:
        """Send one request."""
        assert self._transport is not None
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._body.clear()
        self._done = self._streamed = False
        self._transport.write(data)

    def close(self) -> None:
        """Close it and forget its exchange."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------------------------- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on to the parser, all with the time of now."""
        if self._exchange is None:
            self.close()  # bytes that nobody asked for
            return
        self._now_s = monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            exchange = self._exchange
            self.close()
            if exchange is not None:
                self._client.end(exchange, "malformed answer", str(error))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the exchange that was on it."""
        exchange, self._exchange, self._transport = self._exchange, None, None
        if exchange is not None:
            kind = "connection lost" if exchange.chunk_s or exchange.status else "connection lost before an answer"
            self._client.end(exchange, kind, str(error or "closed by the server"))

    # ---------------------------------------------------------------------------------------- called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep what says where the request went."""
        name = name.lower()
        if name.startswith(GATEWAY_HEADER) or name in KEPT_HEADERS:
            assert self._exchange is not None
            self._exchange.headers[name.decode("latin-1")] = value.decode("latin-1")
        elif name == b"content-type":
            self._streamed = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        """Keep the status."""
        assert self._exchange is not None
        self._exchange.status = self._parser.get_status_code()
        self._streamed = self._streamed and self._exchange.status == 200

    def on_body(self, body: bytes) -> None:
        """Split a piece of the answer into events; a piece is nearly always exactly one."""
        if not self._streamed:
            if len(self._body) < MAX_EVENT_BYTES:
                self._body += body
            return
        if self._rest:
            body = self._rest + body
            self._rest = b""
        end = body.find(b"\n\n")
        if end == len(body) - 2 and end >= 0:
            self._on_event(body)
            return
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
        *events, rest = body.split(b"\n\n")
        for event in events:
            self._on_event(event)
        self._rest = rest
        if len(rest) > MAX_EVENT_BYTES:
            raise httptools.HttpParserError("an event without an end")

    def _on_event(self, event: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        # Inside a JSON string the quotes would be escaped, so these bytes are the key itself.
        if b'"choices":[{' in event or b'"choices": [{' in event:
            exchange.chunk_s.append(self._now_s)
            return
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                self._on_other_data(exchange, line[5:].strip())

    def _on_other_data(self, exchange: Exchange, data: bytes) -> None:
        """Usage, an error, or the end."""
        if data == b"[DONE]":
            self._done = True
            return
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            exchange.failure, exchange.detail = "malformed event", data[:200].decode(errors="replace")
        elif "error" in value:
            exchange.failure, exchange.detail = "error event", _message(value)
        elif isinstance(value.get("usage"), dict):
            exchange.usage = value["usage"]

    def on_message_complete(self) -> None:
        """Judge the answer and give the connection back."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        failure, detail = exchange.failure, exchange.detail
        if exchange.status != 200:
            failure, detail = f"HTTP {exchange.status}", _text_of(bytes(self._body))
        elif not failure and not self._streamed:
            failure, detail = "not a stream", _text_of(bytes(self._body))
        elif not failure and not self._done:
            failure, detail = "ended without [DONE]", ""
        elif not failure and not exchange.chunk_s:
            failure, detail = "no token", ""
        keep = self._parser.should_keep_alive() and self.is_open
        if keep:
            self.idle_since_s = self._now_s
            self._client.release(self)
        else:
            self.close()
        self._client.end(exchange, failure, detail)


def _message(value: dict[str, Any]) -> str:
    error = value["error"]
    text = error.get("message", "") if isinstance(error, dict) else error
    return str(text)[:200]


def _text_of(body: bytes) -> str:
    """The message of an error body, OpenAI's shape or any other."""
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if isinstance(value, dict) and "error" in value:
        return _message(value)
    return body[:200].decode(errors="replace")
