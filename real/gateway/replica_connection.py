"""One connection to a replica: kept open between requests, one request at a time on it."""

import asyncio
from typing import TYPE_CHECKING, cast

from real.gateway.replicas import Replica

if TYPE_CHECKING:
    from real.gateway.exchange import Exchange


class ReplicaConnection(asyncio.Protocol):
    """A connection, and the clock of the request on it.

    Attributes:
        replica: where it leads.
        exchange: the request under way.
        stays_open: whether the replica keeps it open after the answer under way.
        lost: whether it can no longer be used.
        idle_since_s: when its last request ended.
    """

    __slots__ = ("_timer", "_timer_s", "exchange", "idle_since_s", "loop", "lost", "replica", "stays_open", "transport")

    transport: asyncio.Transport

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.loop = asyncio.get_running_loop()
        self.exchange: Exchange | None = None
        self.lost = False
        self.stays_open = True
        self.idle_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request under way."""
        self.lost = True
        self._stop_timer()
        if self.exchange is not None:
            self.exchange.fail("reset")

    def begin(self, exchange: "Exchange", wire: bytes) -> None:
        """Send a request."""
        self.exchange = exchange
        if self.lost or self.transport.is_closing():  # since it was made, or taken from those kept
            exchange.fail("reset")
        else:
            self.transport.write(wire)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer; without a request, there should be none."""
        exchange = self.exchange
        if exchange is None:
            self.abort()
            return
        exchange.receive(data)

    def look_at(self, due_s: float) -> None:
        """Have the request under way look at its clock at some time, or earlier.

        A timer that was set for an earlier request, and rings earlier, does: few requests need one of their own.
        """
        if self._timer is not None:
            if self._timer_s <= due_s:
                return
            self._timer.cancel()
        self._timer, self._timer_s = self.loop.call_at(due_s, self._ring), due_s

    def _ring(self) -> None:
        self._timer = None
        if self.exchange is not None:
            again_s = self.exchange.look_at_clock(self.loop.time())
            if again_s is not None:
                self.look_at(again_s)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause(self) -> None:
        """Read no more for now."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once."""
        self.lost = True
        self._stop_timer()
        self.transport.abort()
