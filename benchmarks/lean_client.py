"""A load client that costs as little as it can: when bytes came, whether the answer was whole, and nothing else.

The client of the tests parses and keeps everything, at 20 microseconds a chunk; a thousand streams of it beside an
expert fill a core, and then it is the core that is measured.
"""

import asyncio
import json
from array import array
from time import monotonic
from typing import Any, cast

_CHUNKED = b"transfer-encoding: chunked"
_LENGTH = b"content-length: "


class LeanReply:
    """What one request came to.

    Attributes:
        times_s: when each read brought bytes of the body.
        whole: whether it was a 200 whose body came to its end, a stream's with ``[DONE]`` and without an error.
    """

    __slots__ = ("ended_s", "sent_s", "times_s", "whole")

    def __init__(self, sent_s: float) -> None:
        self.sent_s = sent_s
        self.ended_s = sent_s
        self.times_s = array("d")
        self.whole = False

    @property
    def ttft_s(self) -> float:
        """Seconds to the first bytes of the body."""
        return self.times_s[0] - self.sent_s if self.times_s else float("nan")

    @property
    def took_s(self) -> float:
        """Seconds to the end."""
        return self.ended_s - self.sent_s


class LeanConnection(asyncio.Protocol):
    """One connection that sends the same request again and again."""

    transport: asyncio.Transport

    def __init__(self, wire: bytes) -> None:
        self._wire = wire
        self._over: asyncio.Future[None] | None = None
        self._head = b""
        self._left = 0  # of the body; -1: it ends with a chunk of nothing
        self._is_done = self._is_error = False
        self.reply = LeanReply(0.0)
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request under way."""
        self.lost = True
        self._end()

    async def request(self) -> LeanReply:
        """Send the request and wait for its end."""
        self._over = asyncio.get_running_loop().create_future()
        self._head, self._is_done, self._is_error = b"", False, False
        self.reply = reply = LeanReply(monotonic())
        self.transport.write(self._wire)
        await self._over
        return reply

    def data_received(self, data: bytes) -> None:
        """Note when bytes of the body come, and find its end."""
        if self._head[-4:] != b"\r\n\r\n":
            data = self._read_head(data)
            if not data:
                return
        self.reply.times_s.append(monotonic())
        if self._left < 0:
            self._is_done = self._is_done or b"data: [DONE]" in data
            self._is_error = self._is_error or b'data: {"error"' in data
            if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
                self.reply.whole = self._is_ok() and self._is_done and not self._is_error
                self._end()
        else:
            self._left -= len(data)
            if self._left == 0:
                self.reply.whole = self._is_ok()
                self._end()

    def _read_head(self, data: bytes) -> bytes:
        head, end, rest = (self._head + data).partition(b"\r\n\r\n")
        self._head = head + end
        if end:
            lower = head.lower()
            self._left = -1 if _CHUNKED in lower else int(lower.partition(_LENGTH)[2].partition(b"\r\n")[0])
        return rest

    def _is_ok(self) -> bool:
        return self._head.startswith(b"HTTP/1.1 200 ")

    def _end(self) -> None:
        self.reply.ended_s = monotonic()
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


def wire_of(fields: dict[str, Any]) -> bytes:
    """Return the bytes of a completion request."""
    body = json.dumps(fields).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: lean\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    return head % len(body) + body


async def connect(port: int, wire: bytes) -> LeanConnection:
    """Return a connection to a port of this machine."""
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(lambda: LeanConnection(wire), "127.0.0.1", port))[1]
