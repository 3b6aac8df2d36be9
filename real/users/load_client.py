"""The HTTP side of real users: thousands of streamed completions from one process."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from real.users.exchange import Exchange
from real.users.load_connection import LoadConnection
from sim.serve_spec import TimeoutSpec

__all__ = ["Exchange", "LoadClient", "Patience", "patience"]

IDLE_CONNECTION_S = 2.0
"""A connection unused for longer is not used again: servers close idle ones, uvicorn after 5 s, and a request sent into
a closing connection would count as the server's failure."""
PATIENCE_S = 10.0
"""How much longer than the gateway a user waits, so that it is the gateway's own time-out that a request sees."""
SWEEP_S = 0.5


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
        self._idle: list[LoadConnection] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self.active: dict[Exchange, LoadConnection | None] = {}
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
                    lambda: LoadConnection(self), self._host, self._port, ssl=self._tls
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

    def release(self, connection: LoadConnection) -> None:
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
