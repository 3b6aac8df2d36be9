"""A load client of raw connections: it notes when every byte came and how the answer ended, and judges nothing."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import uvloop


@dataclass(frozen=True, slots=True)
class Settled:
    """What the ledger needs of a reply: a long run cannot keep all bytes."""

    request_id: str
    path: str
    end: str
    outcome: str


@dataclass
class Reply:
    """What one request came to.

    Attributes:
        end: ``clean`` (a whole message), ``cut`` (the connection ended before), ``refused`` (no connection), or
            ``left`` (by us).
    """

    request_id: str
    sent_s: float
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    end: str = "cut"
    path: str = ""

    @property
    def events(self) -> list[bytes]:
        return [event for event in self.body.replace(b"\r\n", b"\n").split(b"\n\n") if event]

    @property
    def errors(self) -> int:
        return sum(event.startswith(b'data: {"error"') for event in self.events)

    @property
    def is_done(self) -> bool:
        return self.events[-1:] == [b"data: [DONE]"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def outcome(self) -> str:
        """``completed``, ``failed`` with how, or ``cancelled``: exactly one for each request sent."""
        if self.end == "left":
            return "cancelled"
        if self.end != "clean":
            return f"failed: {self.end}"
        if self.status != 200:
            return f"failed: {self.status}"
        streamed = self.headers.get("content-type", "").startswith("text/event-stream")
        if streamed and self.errors:
            return "failed: error event"
        if streamed and not self.is_done:
            return "failed: no [DONE]"
        return "completed"

    @property
    def settled(self) -> Settled:
        return Settled(self.request_id, self.path, self.end, self.outcome)

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    @property
    def took_s(self) -> float:
        return self.ended_s - self.sent_s


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.over: asyncio.Future[None] | None = None
        self.lost = False
        self.on_chunk: Callable[[Reply], None] | None = None
        self.parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True
        self._end("cut")

    def data_received(self, data: bytes) -> None:
        if self.reply is None:
            self.lost = True
            self.transport.abort()
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_status(self, status: bytes) -> None:
        pass

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self.reply is not None
        self.reply.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self.reply is not None
        self.reply.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        reply = self.reply
        assert reply is not None
        reply.times_s.append(time.monotonic())
        self.parts.append(body)
        if self.on_chunk is not None:
            self.on_chunk(reply)

    def on_message_complete(self) -> None:
        if not self.parser.should_keep_alive():
            self.lost = True
            self.transport.abort()  # what has not been sent by now is not wanted
        self._end("clean")

    def _end(self, how: str) -> None:
        reply, self.reply = self.reply, None
        if reply is not None:
            reply.end = how
            reply.ended_s = time.monotonic()
            reply.body = b"".join(self.parts)
            self.parts = []
            if self.over is not None and not self.over.done():
                self.over.set_result(None)

    def send(self, wire: bytes, request_id: str) -> tuple[Reply, asyncio.Future[None]]:
        self.parser = httptools.HttpResponseParser(self)
        self.over = asyncio.get_running_loop().create_future()
        self.reply = reply = Reply(request_id, time.monotonic())
        self.transport.write(wire)
        return reply, self.over

    def leave(self) -> None:
        """Go without waiting for the rest."""
        self._end("left")
        self.lost = True
        self.transport.abort()


def wire_request(path: str, body: bytes | None, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """A request's bytes."""
    lines = {"host": "test", **(headers or {})}
    if body is not None:
        lines = {"content-type": "application/json", "content-length": str(len(body)), **lines}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b"")


class Client:
    """Connections to one address, kept alive between requests."""

    def __init__(self, port: int, *, headers: dict[str, str] | None = None) -> None:
        self.port = port
        self.headers = headers or {}
        self.idle: list[Connection] = []
        self.open: list[Connection] = []
        self.numbers = 0
        self.replies: list[Reply] = []

    async def connect(self) -> Connection:
        while self.idle:
            connection = self.idle.pop()
            if not connection.lost:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port)
        return connection

    async def request(
        self,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        method: str | None = None,
        leave_after_s: float | None = None,
        leave_after_chunks: int | None = None,
        timeout_s: float = 60.0,
    ) -> Reply:
        """Send one request and wait for its end, whatever that is."""
        self.numbers += 1
        given = {**self.headers, **(headers or {})}
        request_id = given.setdefault("x-request-id", f"r{id(self)}-{self.numbers}")
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        wire = wire_request(path, data, given, method or ("GET" if data is None else "POST"))
        try:
            connection = await self.connect()
        except OSError:
            now_s = time.monotonic()
            reply = Reply(request_id, now_s, ended_s=now_s, end="refused", path=path)
            self.replies.append(reply)
            return reply
        reply, over = connection.send(wire, request_id)
        reply.path = path
        self.open.append(connection)
        self.replies.append(reply)
        if leave_after_chunks is not None:
            connection.on_chunk = lambda r: connection.leave() if len(r.times_s) >= leave_after_chunks else None
        try:
            async with asyncio.timeout(leave_after_s if leave_after_s is not None else timeout_s):
                await over
        except TimeoutError:
            if leave_after_s is None:
                raise AssertionError(f"{request_id} hangs: {reply}") from None
            connection.leave()
        connection.on_chunk = None
        self.open.remove(connection)
        if not connection.lost:
            self.idle.append(connection)
        return reply

    async def complete(
        self, prompt: str = "hello", *, max_tokens: int = 8, stream: bool = True, **fields: Any
    ) -> Reply:
        """Send one completion request; ``mock=...``, ``model=...`` and others go into its body."""
        sending = {name: fields.pop(name) for name in list(fields) if name in _SENDING}
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": stream, **fields}
        return await self.request("/v1/completions", body, **sending)

    def close(self) -> None:
        for connection in (*self.idle, *self.open):
            connection.transport.abort()
        self.idle = []


def play(port: int, story: Callable[[Client], Awaitable[None]], replies: list[Reply] | None = None) -> None:
    """Run a story with a client of its own; the replies are kept in the list."""

    async def whole() -> None:
        client = Client(port)
        client.replies = [] if replies is None else replies
        try:
            await story(client)
        finally:
            client.close()
            await asyncio.sleep(0)

    uvloop.run(whole())


_SENDING = ("headers", "leave_after_s", "leave_after_chunks", "timeout_s")
