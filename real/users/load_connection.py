"""One connection of a real user: HTTP and server-sent events as bytes, each chunk with its time.

Built on ``asyncio.Protocol`` and httptools (the parser that vLLM's own server uses) rather than on a client library,
because a chunk must cost microseconds: with the client on the same machine as what it measures, its work is taken from
that. A chunk is looked at as bytes; JSON is parsed once an answer, for its usage.

First token is the first chunk with a choice, as in vLLM's load generator. An error event fails the request although
``[DONE]`` follows, and so does an answer that ends without ``[DONE]``.
"""

import asyncio
import json
from math import nan
from time import monotonic
from typing import Any, Protocol, cast

import httptools

from real.users.exchange import Exchange

MAX_EVENT_BYTES = 2**22
KEPT_HEADERS = frozenset({b"retry-after", b"x-request-id"})
GATEWAY_HEADER = b"x-expert-router-"


class Client(Protocol):
    """Whose connection it is."""

    def end(self, exchange: Exchange, failure: str, detail: str = "") -> None:
        """An exchange has ended; an empty ``failure`` is a good answer."""
        ...

    def release(self, connection: "LoadConnection") -> None:
        """The connection can carry the next request."""
        ...


class LoadConnection(asyncio.Protocol):
    """One keep-alive connection, with at most one exchange at a time."""

    def __init__(self, client: Client):
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
        if exchange is None:
            return
        if exchange.failure or self._done:  # all was said before
            self._client.end(exchange, exchange.failure, exchange.detail)
            return
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
