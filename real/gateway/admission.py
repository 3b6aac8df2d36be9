"""Who may go in: at most so many requests in flight per replica, a bounded queue per expert, and 429 for the rest.

Requests wait in order of arrival among those that may go to the same experts. The time to try again that a refused
client is told is how long the queue before it takes at the rate at which answers have ended lately.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from real.gateway.error_events import Refusal
from real.gateway.replicas import Place, Replica, Routing
from sim.usable_replicas import Wish

_RATE_MEMORY_S = 10.0
_LONGEST_RETRY_AFTER_S = 60.0


class DrainRate:
    """Answers ended per second, over about the last ten."""

    __slots__ = ("_count", "_since_s")

    def __init__(self) -> None:
        self._count = 0.0
        self._since_s = 0.0

    def ended(self, now_s: float) -> None:
        """Count an answer's end."""
        self._count = self._faded(now_s) + 1
        self._since_s = now_s

    def retry_after_s(self, queued: int, now_s: float) -> float:
        """Return how long it takes until that many have left the queue, between 1 and 60 s."""
        rate_rps = self._faded(now_s) / _RATE_MEMORY_S
        if rate_rps <= 0:
            return 1.0
        return min(max(1.0, queued / rate_rps), _LONGEST_RETRY_AFTER_S)

    def _faded(self, now_s: float) -> float:
        return self._count * math.exp((self._since_s - now_s) / _RATE_MEMORY_S)


@dataclass(slots=True, eq=False)
class _Waiter:
    wish: Wish
    number: int
    place: asyncio.Future[Place]
    in_line: bool = True


class Admission:
    """Places among the requests in flight, for one worker of a gateway.

    Attributes:
        queued: per expert, requests waiting that prefer it; the last entry, those that may go anywhere.
    """

    def __init__(
        self,
        routing: Routing,
        *,
        queue_bound: int,
        queue_s: float,
        clock: Callable[[], float],
        on_in_flight: Callable[[Replica], None] = lambda replica: None,
        on_queued: Callable[[int, int], None] = lambda line, depth: None,
    ) -> None:
        """Begin with nobody in.

        Args:
            routing: chooses replicas.
            queue_bound: longest queue per expert.
            queue_s: longest wait.
            clock: tells seconds.
            on_in_flight: told each replica whose requests in flight have changed.
            on_queued: told each line of ``queued`` that has changed, and its length.
        """
        experts = len(routing.by_expert)
        self._routing = routing
        self._bounds = [queue_bound] * experts + [queue_bound * experts]
        self._queue_s = queue_s
        self._clock = clock
        self._on_in_flight = on_in_flight
        self._on_queued = on_queued
        self._queues: dict[Wish, deque[_Waiter]] = {}
        self._arrivals = 0
        self._rates = [DrainRate() for _ in range(experts + 1)]
        self.queued = [0] * (experts + 1)

    async def place(self, wish: Wish) -> Place:
        """Return a place, as soon as there is one.

        Raises:
            Refusal: the queue is full, waiting took too long, or nothing that could answer is up.
        """
        if not self._queues.get(wish):
            replica = self._routing.choose(wish, self._clock())
            if replica is not None:
                return self._take(replica)
        line = _line(wish)
        if self.queued[line] >= self._bounds[line]:
            raise self._overload("queue_full", line)
        return await self._wait(wish, line)

    async def _wait(self, wish: Wish, line: int) -> Place:
        self._arrivals += 1
        waiter = _Waiter(wish, self._arrivals, asyncio.get_running_loop().create_future())
        queue = self._queues.setdefault(wish, deque())
        queue.append(waiter)
        self._count(line, 1)
        try:
            async with asyncio.timeout(self._queue_s):
                return await waiter.place
        except TimeoutError:
            self._give_back(waiter)
            raise self._overload("queue_timeout", line) from None
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise
        finally:
            self._count(line, -1)
            if waiter.in_line:
                queue.remove(waiter)

    def _count(self, line: int, change: int) -> None:
        self.queued[line] += change
        self._on_queued(line, self.queued[line])

    def _give_back(self, waiter: _Waiter) -> None:
        """Free the place that a waiter got in the moment in which it left."""
        if waiter.place.done() and not waiter.place.cancelled() and waiter.place.exception() is None:
            self.release(waiter.place.result())

    def another(self, wish: Wish, besides: Replica) -> Place | None:
        """Return a place for a second try; None when there is none at once."""
        try:
            replica = self._routing.choose(wish, self._clock(), besides)
        except Refusal:
            return None
        return None if replica is None else self._take(replica)

    def _take(self, replica: Replica) -> Place:
        place = self._routing.send_to(replica)
        self._on_in_flight(replica)
        return place

    def release(self, place: Place) -> None:
        """Free a place, once its request is over, and hand it on."""
        replica = place.replica
        replica.health.over(place.epoch)
        replica.outstanding -= 1
        self._on_in_flight(replica)
        now_s = self._clock()
        self._rates[replica.expert].ended(now_s)
        self._rates[-1].ended(now_s)
        self.hand_out()

    def hand_out(self) -> None:
        """Give free places to those who wait; to be called whenever a place may have become free, or a replica left."""
        while any(self.queued) and (
            heads := sorted((queue[0] for queue in self._queues.values() if queue), key=lambda head: head.number)
        ):
            if not any(self._serve(head) for head in heads):
                return

    def _serve(self, head: _Waiter) -> bool:
        """Whether the first of a queue need not wait any longer."""
        try:
            replica = self._routing.choose(head.wish, self._clock())
        except Refusal as refusal:
            self._leave(head)
            if not head.place.done():
                head.place.set_exception(refusal)
            return True
        if replica is None:
            return False
        self._leave(head)
        if not head.place.done():
            head.place.set_result(self._take(replica))
        return True

    def _leave(self, head: _Waiter) -> None:
        self._queues[head.wish].popleft()
        head.in_line = False

    def _overload(self, outcome: str, line: int) -> Refusal:
        after_s = self._rates[line].retry_after_s(self.queued[line] + 1, self._clock())
        return Refusal(outcome, 429, "too many requests for now; try again later", retry_after_s=after_s)


def _line(wish: Wish) -> int:
    """Index of the queue whose bound a request counts toward."""
    return -1 if wish.anywhere else wish.experts[0]
