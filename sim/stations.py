"""The servers a request meets outside the engine: the router's workers and a replica's front-end process.

Both do two kinds of work on the same CPU: per request, and per streamed token. Requests are served one by one; tokens
are treated as a fluid, because at 1,000 users there are a hundred of them per request.
"""

from collections.abc import Callable
from heapq import heapreplace

from sim.spec import RouterSpec


class FrontEndStation:
    """The API server process of one replica: one server, first come first served.

    After every engine iteration it has ``work`` seconds to do for the tokens of that iteration. Over a run of
    iterations its backlog follows Lindley's recursion, which has a closed form because iterations only get longer
    while a batch only decodes (the largest partial sum of a decreasing sequence lies at one of its ends).
    """

    __slots__ = ("_accepted_s", "_as_of_s", "_backlog_s")

    def __init__(self) -> None:
        self._backlog_s = 0.0
        self._as_of_s = 0.0
        self._accepted_s = 0.0

    def busy_until(self, now_s: float) -> float:
        """Return the seconds it has worked so far."""
        return self._accepted_s - max(0.0, self._backlog_s - max(0.0, now_s - self._as_of_s))

    def lose_all(self, now_s: float) -> None:
        """Forget the work that is not done, as a process does when it is killed."""
        self._accepted_s = self.busy_until(now_s)
        self._backlog_s = 0.0
        self._as_of_s = now_s

    def take_request(self, now_s: float, work_s: float) -> float:
        """Queue one request's work; return when it is taken up."""
        wait_s = max(0.0, self._backlog_s - (now_s - self._as_of_s))
        self._backlog_s = wait_s + work_s
        self._as_of_s = now_s
        self._accepted_s += work_s
        return now_s + wait_s

    def take_tokens(self, iterations: int, work_s: float, first_end_s: float, last_end_s: float) -> float:
        """Queue the tokens of successive iterations, ``work_s`` each; return the delay of the last one's tokens.

        The tokens of an iteration count as delivered when the last of them is.
        """
        others_s = (iterations - 1) * work_s
        backlog_s = max(
            0.0,
            self._backlog_s - (last_end_s - self._as_of_s) + others_s,
            others_s - (last_end_s - first_end_s),
        )
        self._backlog_s = backlog_s + work_s
        self._as_of_s = last_end_s
        self._accepted_s += iterations * work_s
        return self._backlog_s


class RouterStation:
    """The gateway: ``workers`` servers with one queue for requests, and the token stream of the whole fleet.

    Without token work it is exactly a G/G/c queue: a request goes to the worker with the least unfinished work, as in
    the workload vector of Kiefer and Wolfowitz (1955). Streamed tokens arrive as a fluid, evenly over the workers; each
    worker's unfinished work shrinks at 1 minus their rate, and grows when they alone are more than it can do.

    All workers' work shrinks alike, so one clock that runs at that pace stands for it: a worker is through when the
    clock passes its mark.

    A worker that has nothing to do sleeps, and waking it costs ``per_wake_up_s`` (its event loop's turn, caches gone
    cold) before the first request or the first token of an engine iteration; what follows while it is awake does not
    pay again. That is why a token costs less the more of them come together: with ``b`` a token and ``n`` of them in
    an iteration ``b + w / n`` each. Tokens of others keep it awake for the share of time that they take.
    """

    __slots__ = (
        "_as_of_s",
        "_clock_s",
        "_marks_s",
        "_per_prompt_token_s",
        "_per_request_s",
        "_per_token_s",
        "_per_wake_up_s",
        "_request_busy_s",
        "_service_factor",
        "_token_busy_s",
        "_token_load",
        "_token_work",
        "_wake_ups_per_s",
        "_workers",
    )

    def __init__(self, spec: RouterSpec, service_factor: Callable[[], float]):
        """Build an idle router; ``service_factor`` returns one random factor of mean 1 per request."""
        self._per_request_s = spec.per_request_s
        self._per_prompt_token_s = spec.per_prompt_token_s
        self._per_token_s = spec.per_output_token_s
        self._per_wake_up_s = spec.per_wake_up_s
        self._workers = spec.workers
        self._service_factor = service_factor
        self._marks_s = [0.0] * spec.workers  # a heap
        self._clock_s = 0.0
        self._as_of_s = 0.0
        self._token_work = 0.0  # of the tokens themselves, as a share of each worker's time
        self._wake_ups_per_s = 0.0  # engine iterations that reach each worker, awake or not
        self._token_load = 0.0  # both as a share of each worker's time
        self._request_busy_s = 0.0
        self._token_busy_s = 0.0

    @property
    def wake_ups_cost(self) -> bool:
        """Whether being woken takes any of its time."""
        return self._per_wake_up_s > 0

    @property
    def streams_cost(self) -> bool:
        """Whether streamed tokens take any of its time."""
        return self._per_token_s > 0 or self._per_wake_up_s > 0

    def _settle(self, now_s: float) -> float:
        """Let the clock run until now and return it."""
        elapsed_s = now_s - self._as_of_s
        if elapsed_s > 0:
            load = self._token_load
            if load > 1:  # the clock runs back: work piles up, at idle workers as well
                clock_s = self._clock_s
                self._marks_s = [max(mark_s, clock_s) for mark_s in self._marks_s]
            self._clock_s += elapsed_s * (1 - load)
            self._token_busy_s += elapsed_s * min(load, 1.0)
            self._as_of_s = now_s
        return self._clock_s

    def busy_until(self, now_s: float) -> float:
        """Return the worker seconds of work, requests and tokens together, taken on so far."""
        self._settle(now_s)
        return self._request_busy_s + self._token_busy_s * self._workers

    def take_request(self, now_s: float, prompt_tokens: int) -> tuple[float, float]:
        """Queue one request; return when a worker takes it up and when it is classified and sent on."""
        service_s = (self._per_request_s + prompt_tokens * self._per_prompt_token_s) * self._service_factor()
        clock_s = self._settle(now_s)
        mark_s = self._marks_s[0]
        start_s = now_s
        if mark_s > clock_s:
            start_s += mark_s - clock_s
        else:
            mark_s = clock_s
            service_s += self._wake_up_s
        heapreplace(self._marks_s, mark_s + service_s)
        self._request_busy_s += service_s
        return start_s, start_s + service_s

    @property
    def _wake_up_s(self) -> float:
        """What work that meets a worker without requests costs to wake it: nothing where tokens keep it awake."""
        return self._per_wake_up_s * max(0.0, 1 - self._token_load) if self._per_wake_up_s else 0.0

    def change_token_rate(self, now_s: float, change_tokens_per_s: float, change_wake_ups_per_s: float = 0.0) -> None:
        """Let the fleet stream this many tokens per second more (or fewer) from now on, in so many iterations.

        Args:
            now_s: the time.
            change_tokens_per_s: of the whole fleet.
            change_wake_ups_per_s: times per second at which a worker gets tokens, see ``wake_ups_per_s``; needed only
                where wake-ups cost.
        """
        self._settle(now_s)
        self._token_work += change_tokens_per_s * self._per_token_s / self._workers
        self._token_load = self._token_work
        if self._per_wake_up_s:
            self._wake_ups_per_s += change_wake_ups_per_s
            if self._token_work < 1:
                # Of its wake-ups a worker pays the share in which nothing else keeps it awake: u = t + w (1 - u).
                waking = self._wake_ups_per_s * self._per_wake_up_s
                self._token_load = (self._token_work + waking) / (1 + waking)

    def wake_ups_per_s(self, tokens_per_s: float, burst_tokens: int) -> float:
        """Return how often each worker gets tokens of a stream of iterations of ``burst_tokens`` each."""
        # An iteration reaches as many of the workers as it has tokens.
        return tokens_per_s / max(burst_tokens, self._workers)

    def token_delay_s(self, now_s: float, lead_s: float, burst_tokens: int) -> float:
        """Mean delay of the tokens of one engine iteration, which arrive together ``lead_s`` from now.

        What is known now tells the backlog they will find: it shrinks at the pace of now until they arrive.
        """
        clock_s = self._settle(now_s) + lead_s * (1 - self._token_load)
        workers = self._workers
        delay_s = self._per_token_s * (1 + (burst_tokens - 1) / (2 * workers))
        wake_up_s = self._wake_up_s
        for mark_s in self._marks_s:
            delay_s += ((mark_s - clock_s) if mark_s > clock_s else wake_up_s) / workers
        return delay_s
