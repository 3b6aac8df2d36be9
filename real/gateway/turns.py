"""Work that comes in floods, a little in each turn of the event loop, so that everybody else gets their turn as well.

When an expert dies with hundreds of streams open, each of them must be told, logged and counted. Done in one turn, that
holds up for a tenth of a second and more whoever comes next.
"""

import asyncio
import math
from collections import deque

AT_LEAST = 4
"""Broken answers a turn: about 1 ms of work."""
SPREAD_S = 0.5
"""Where turns are so long that a flood would take longer than this, more go on in each."""


class Turns:
    """Lets some go on in each turn of the loop, in order of arrival; who comes alone does not wait.

    Who has got nothing yet goes before those whose answer has ended early: the next request after a death must not wait
    until all of the dead's streams have been told.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = AT_LEAST
        self._first: deque[asyncio.Future[None]] = deque()
        self._then: deque[asyncio.Future[None]] = deque()
        self._most_waiting = 0
        self._turn_s = math.nan  # when the present turn began; not a number between floods

    async def mine(self, *, first: bool) -> None:
        """Wait until it is the caller's turn; ``first``: before those who are not."""
        if math.isnan(self._turn_s):
            self._turn_s = self._loop.time()
            self._loop.call_soon(self._next)
        if self._left:
            self._left -= 1
            return
        waiter = self._loop.create_future()
        (self._first if first else self._then).append(waiter)
        await waiter

    def _next(self) -> None:
        began_s, self._turn_s = self._turn_s, self._loop.time()
        self._most_waiting = max(self._most_waiting, len(self._first) + len(self._then))
        pace = math.ceil(self._most_waiting * (self._turn_s - began_s) / SPREAD_S)
        self._left = max(AT_LEAST, pace)
        while self._left and (line := self._first or self._then):
            waiter = line.popleft()
            if not waiter.done():  # cancelled
                waiter.set_result(None)
                self._left -= 1
        if self._left < AT_LEAST or self._first or self._then:
            self._loop.call_soon(self._next)
        else:
            self._left, self._most_waiting, self._turn_s = AT_LEAST, 0, math.nan
