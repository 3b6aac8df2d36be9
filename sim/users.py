"""Who sends requests: closed-loop users, and arrivals that ignore completions. Both hand out requests one by one."""

from collections.abc import Iterator
from itertools import count

from sim.request import Request
from sim.traffic import ClosedLoopTraffic, OpenTraffic, TraceTraffic

PAUSE_AFTER_FAILURE_S = 1.0
"""A user whose request failed waits at least this long, or as long as the server asks for, before the next one."""


class ClosedLoopUsers:
    """Users 0 .. n - 1, each at the next of its requests."""

    def __init__(self, traffic: ClosedLoopTraffic, users: int):
        self._traffic = traffic
        self._users = users
        self._ids = count()
        self._next_round = [0] * users
        # Rounds some user has begun and not all have; views, because indexing them gives plain numbers quickly.
        self._rounds: dict[int, tuple[memoryview, memoryview, memoryview, memoryview]] = {}
        self._left_in_round: dict[int, int] = {}

    def next_request(self, user: int) -> tuple[Request, float]:
        """Return a user's next request and the seconds of thought before it (for the first one, when it starts)."""
        k = self._next_round[user]
        self._next_round[user] = k + 1
        columns = self._rounds.get(k)
        if columns is None:
            drawn = self._traffic.round(k)
            columns = self._rounds[k] = (
                drawn.class_index.data,
                drawn.prompt_tokens.data,
                drawn.output_tokens.data,
                drawn.think_s.data,
            )
            self._left_in_round[k] = self._users
        self._left_in_round[k] -= 1
        if not self._left_in_round[k]:
            del self._rounds[k], self._left_in_round[k]
        request = Request(next(self._ids), user, columns[0][user], columns[1][user], columns[2][user])
        return request, columns[3][user]


def arriving_requests(traffic: OpenTraffic | TraceTraffic) -> Iterator[Request]:
    """Yield the requests of an open loop or a trace in order of arrival, their ``sent_s`` set."""
    ids = count()
    for block in traffic.blocks():
        rows = zip(*(column.tolist() for column in block), strict=True)
        for sent_s, class_index, prompt_tokens, output_tokens, prefix_id, prefix_tokens in rows:
            request = Request(next(ids), -1, class_index, prompt_tokens, output_tokens)
            request.sent_s = sent_s
            if prefix_id >= 0:
                request.prefix = prefix_id, prefix_tokens
            yield request
