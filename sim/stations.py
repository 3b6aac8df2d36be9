"""The servers a request meets outside the engine: the router's workers and a replica's front-end process.

Both do two kinds of work on the same CPU: per request, and per streamed token. Requests are served one by one; tokens
are treated as a fluid, because at 1,000 users there are a hundred of them per request.
"""

from collections.abc import Callable

from sim.spec import RouterSpec


class FrontEndStation:
    """The API server process of one replica: one server, first come first served.

    After every engine iteration it has ``work`` seconds to do for the tokens of that iteration. Over a run of
    iterations its backlog follows Lindley's recursion, which has a closed form because iterations only get longer
    while a batch only decodes (the largest partial sum of a decreasing sequence lies at one of its ends).

    Attributes:
        busy_s: work accepted so far, in seconds.
    """

    __slots__ = ("_as_of_s", "_backlog_s", "busy_s")

    def __init__(self) -> None:
        self._backlog_s = 0.0
        self._as_of_s = 0.0
        self.busy_s = 0.0

    def take_request(self, now_s: float, work_s: float) -> float:
        """Queue one request's work; return when it is taken up."""
        wait_s = max(0.0, self._backlog_s - (now_s - self._as_of_s))
        self._backlog_s = wait_s + work_s
        self._as_of_s = now_s
        self.busy_s += work_s
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
        self.busy_s += iterations * work_s
        return self._backlog_s


class RouterStation:
    """The gateway: ``workers`` servers with one queue for requests, and the token stream of the whole fleet.

    Without token work it is exactly a G/G/c queue, by the workload vector of Kiefer and Wolfowitz (1955): a request
    goes to the worker with the least unfinished work. Streamed tokens arrive as a fluid, evenly over the workers; each
    worker's unfinished work shrinks at 1 minus their rate, and grows when they alone are more than it can do.

    Attributes:
        busy_s: work of requests accepted so far, in worker seconds.
        token_busy_s: work of tokens up to the last change of their rate, in worker seconds.
    """

    __slots__ = ("_as_of_s", "_service_s", "_spec", "_token_load", "_unfinished_s", "busy_s", "token_busy_s")

    def __init__(self, spec: RouterSpec, service_factor: Callable[[], float]):
        """Build an idle router; ``service_factor`` returns one random factor of mean 1 per request."""
        self._spec = spec
        self._service_s = service_factor
        self._unfinished_s = [0.0] * spec.workers
        self._token_load = 0.0  # share of each worker
        self._as_of_s = 0.0
        self.busy_s = 0.0
        self.token_busy_s = 0.0

    @property
    def streams_cost(self) -> bool:
        """Whether streamed tokens take any of its time."""
        return self._spec.per_output_token_s > 0

    def _settle(self, now_s: float) -> list[float]:
        elapsed_s = now_s - self._as_of_s
        unfinished_s = self._unfinished_s
        if elapsed_s > 0:
            done_s = elapsed_s * (1 - self._token_load)
            for i, work_s in enumerate(unfinished_s):
                unfinished_s[i] = work_s - done_s if work_s > done_s else 0.0
            self.token_busy_s += elapsed_s * self._token_load * len(unfinished_s)
            self._as_of_s = now_s
        return unfinished_s

    def busy_until(self, now_s: float) -> float:
        """Return the worker seconds of work accepted so far, requests and tokens together."""
        self._settle(now_s)
        return self.busy_s + self.token_busy_s

    def take_request(self, now_s: float, prompt_tokens: int) -> tuple[float, float]:
        """Queue one request; return when a worker takes it up and when it is classified and sent on."""
        spec = self._spec
        service_s = (spec.per_request_s + prompt_tokens * spec.per_prompt_token_s) * self._service_s()
        unfinished_s = self._settle(now_s)
        wait_s = min(unfinished_s)
        unfinished_s[unfinished_s.index(wait_s)] = wait_s + service_s
        self.busy_s += service_s
        return now_s + wait_s, now_s + wait_s + service_s

    def change_token_rate(self, now_s: float, change_tokens_per_s: float) -> None:
        """Let the fleet stream this many tokens per second more (or fewer) from now on."""
        self._settle(now_s)
        self._token_load += change_tokens_per_s * self._spec.per_output_token_s / self._spec.workers

    def token_delay_s(self, now_s: float, burst_tokens: int) -> float:
        """Mean delay of the tokens of one engine iteration, which arrive together."""
        unfinished_s = self._settle(now_s)
        workers = len(unfinished_s)
        burst_s = self._spec.per_output_token_s * (1 + (burst_tokens - 1) / (2 * workers))
        return sum(unfinished_s) / workers + burst_s
