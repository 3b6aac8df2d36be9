"""What the connections of one worker's clients share, and their end."""

import asyncio
from collections.abc import Awaitable, Callable

from real.gateway.client_connection import KEEP_ALIVE_S, ClientConnection
from real.gateway.error_events import Refusal
from real.gateway.request_parser import Request
from sim.serve_spec import TimeoutSpec


class ClientServer:
    """Makes the connections of one listening socket.

    Attributes:
        connections: those that are open.
    """

    def __init__(
        self,
        handler: Callable[[Request, ClientConnection], Awaitable[None]],
        refuse: Callable[[ClientConnection, Request | None, Refusal], None],
        deadlines: TimeoutSpec,
        most_body_bytes: int,
    ) -> None:
        """Begin without connections.

        Args:
            handler: answers a request.
            refuse: writes a refusal as an answer.
            deadlines: of clients.
            most_body_bytes: longest body of a request.
        """
        self.loop = asyncio.get_running_loop()
        self.handler = handler
        self.refuse = refuse
        self.deadlines = deadlines
        self.most_body_bytes = most_body_bytes
        self.look_s = min(deadlines.slow_reader_s, KEEP_ALIVE_S)
        self.connections: set[ClientConnection] = set()

    def __call__(self) -> ClientConnection:
        """Return the protocol of a new connection."""
        return ClientConnection(self)

    async def close(self, longest_s: float) -> None:
        """Close all connections; what has been written gets so long to be sent."""
        for connection in list(self.connections):
            connection.shut()
        end_s = self.loop.time() + longest_s
        while self.connections and self.loop.time() < end_s:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.transport.abort()
