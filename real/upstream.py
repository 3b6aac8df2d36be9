"""The way to an expert: one request to one replica, and its answer's bytes."""

import asyncio
from dataclasses import dataclass
from typing import Self

import aiohttp

from real.answer import Answer
from real.replicas import Replica
from sim.serve_spec import TimeoutSpec


class UpstreamError(Exception):
    """An expert failed a request.

    Attributes:
        kind: ``connect_failed``, ``reset``, ``first_byte_timeout``, ``idle_timeout`` or ``total_timeout``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(slots=True)
class Exchange:
    """A request whose answer has begun.

    Attributes:
        status: of the answer.
        headers: of the answer, names in lower case.
    """

    status: int
    headers: list[tuple[str, str]]
    first: bytes
    response: aiohttp.ClientResponse
    replica: Replica
    timeouts: TimeoutSpec
    deadline_s: float

    async def relay(self, answer: Answer) -> None:
        """Pass the body on until its end.

        Raises:
            UpstreamError: it did not end well.
        """
        loop = asyncio.get_running_loop()
        data = self.first
        drain = answer.connection._drain_helper
        while data:
            answer.write(data)
            self.replica.heard_s = loop.time()
            await drain()
            try:
                async with asyncio.timeout_at(min(loop.time() + self.timeouts.idle_s, self.deadline_s)):
                    data = await self.response.content.readany()
            except TimeoutError:
                late = loop.time() >= self.deadline_s
                raise UpstreamError("total_timeout" if late else "idle_timeout") from None
            except (aiohttp.ClientError, OSError):
                raise UpstreamError("reset") from None

    def close(self) -> None:
        """Be done with it: an answer that has not ended is cancelled."""
        self.response.close() if not self.response.content.at_eof() else self.response.release()


class Upstream:
    """Connections to all replicas."""

    def __init__(self, timeouts: TimeoutSpec) -> None:
        self._timeouts = timeouts
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3, force_close=False),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )

    async def send(
        self, replica: Replica, path: str, headers: dict[str, str], body: bytes, deadline_s: float
    ) -> Exchange:
        """Send a request and wait for its answer's first body byte (or end).

        Raises:
            UpstreamError: there is none.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(min(loop.time() + self._timeouts.first_byte_s, deadline_s)):
                response = await self._session.post(
                    replica.url + path, data=body, headers=headers, allow_redirects=False
                )
                first = await response.content.readany()
        except aiohttp.ClientConnectorError:
            raise UpstreamError("connect_failed") from None
        except aiohttp.ConnectionTimeoutError:
            raise UpstreamError("connect_failed") from None
        except TimeoutError:
            raise UpstreamError("total_timeout" if loop.time() >= deadline_s else "first_byte_timeout") from None
        except (aiohttp.ClientError, OSError):
            raise UpstreamError("reset") from None
        replica.heard_s = loop.time()
        found = [(name.lower(), value) for name, value in response.headers.items()]
        return Exchange(response.status, found, first, response, replica, self._timeouts, deadline_s)

    async def healthy(self, replica: Replica, timeout_s: float) -> bool | None:
        """Whether a replica calls itself healthy; None when it does not say in time."""
        try:
            async with asyncio.timeout(timeout_s), self._session.get(f"{replica.url}/health") as response:
                return response.status == 200
        except TimeoutError:
            return None
        except (aiohttp.ClientError, OSError):
            return False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
