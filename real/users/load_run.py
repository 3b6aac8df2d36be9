"""One real fleet at one load in one replication: users who send, and the record of what they saw."""

import asyncio
from collections.abc import Callable
from functools import partial
from math import isnan, nan
from time import monotonic

from real.users.client_lag import ClientLag
from real.users.engine_metrics import EngineMetrics
from real.users.exchange import Exchange
from real.users.load_client import LoadClient
from real.users.load_record import Sent, load_record
from real.users.prepared_requests import (
    MADE_BEFORE_THE_START,
    PreparedRequest,
    PreparedRequests,
    closed_loop_requests,
    open_requests,
)
from real.users.prompts import PromptWriter
from real.users.target import Target
from sim.fleet import Outage
from sim.measuring import Window, rare_garbage_collection, replication_seed
from sim.records import RunRecord
from sim.self_checks import Counted
from sim.simulation import RunPlan
from sim.spec import ClosedLoop, OpenLoop
from sim.traffic import ClosedLoopTraffic, OpenTraffic, TraceTraffic
from sim.users import PAUSE_AFTER_FAILURE_S

LONGEST_PAUSE_S = 30.0
HOPELESS = 20  # requests of which none completed, at which a run is given up
PROGRESS_S = 0.25
REQUESTS_A_RUN = 1_000_000  # numbers of prompts that each run has for itself


class LoadRun:
    """Sends the requests of a plan to a target; ``run`` does so once."""

    def __init__(
        self,
        plan: RunPlan,
        target: Target,
        writers: list[PromptWriter],
        *,
        run_id: str,
        number: int = 0,
        progress: Callable[[float], None] | None = None,
    ):
        """Set up the run.

        Args:
            plan: what is run; the same plan can be simulated.
            target: where it is sent.
            writers: of prompts, one a class of the workload.
            run_id: begins every request's id.
            number: of this run among those of one invocation.
            progress: called now and then with the share of the run that is done.
        """
        self._plan = plan
        self._target = target
        self._run_id = run_id
        self._progress = progress
        self._seed = replication_seed(plan.run.seed, plan.replication)
        self._is_closed = isinstance(plan.workload.load, ClosedLoop)
        self._users = int(plan.load) if self._is_closed else 0
        if self._is_closed:
            source = closed_loop_requests(
                ClosedLoopTraffic(plan.workload, self._users, self._seed, plan.data), self._users
            )
        elif isinstance(plan.workload.load, OpenLoop):
            source = open_requests(OpenTraffic(plan.workload, plan.load, self._seed, plan.data))
        else:
            source = open_requests(TraceTraffic(plan.workload, plan.data, self._seed))
        self._prepared = PreparedRequests(
            source, writers, model=target.model, seed=self._seed, first_number=number * REQUESTS_A_RUN
        )
        self._window = Window(plan.workload, plan.run, plan.load)
        self._lead = min(MADE_BEFORE_THE_START, self._window.last or max(1000, 4 * self._users))
        self._sent: list[Sent] = []
        self._next_of_user = [0] * self._users
        self._counted = Counted()
        self._completed = 0
        self._in_flight_at_start = 0
        self._area_at_start_s = 0.0
        self._began_s = nan
        self._exhausted = False
        self._interrupted = False
        self._stopped: list[str] = []
        self._timers: set[asyncio.TimerHandle] = set()

    def interrupt(self) -> None:
        """End now and keep what was measured."""
        self._interrupted = True
        if not isnan(self._began_s):
            self._stop(f"interrupted after {self._now_s():.0f} s: the figures are of what had been measured by then")

    async def run(self) -> RunRecord:
        """Send, wait, and return the record.

        Raises:
            SelfCheckError: the record breaks conservation or Little's law; a defect of this program.
        """
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._prepared.make_ahead(self._lead)
        self._client = LoadClient(self._target.url, self._target.patience, api_key=self._target.api_key)
        self._metrics = EngineMetrics(self._target.replicas)
        self._metrics.start()
        self._lag = ClientLag(self._loop)
        try:
            with rare_garbage_collection():
                self._began_s = monotonic()
                if self._window.opens_at_s == 0:
                    self._open_window(0.0)
                elif self._window.opens_at_s is not None:
                    self._at(self._window.opens_at_s, lambda: self._open_window(self._now_s()))
                if self._plan.run.duration_s is not None:
                    self._at(self._plan.run.duration_s, self._done.set)
                for outage in self._plan.fleet.outages:
                    self._at(outage.at_s, partial(self._kill, outage))
                self._tell_progress()
                self._start_load()
                if self._interrupted:
                    self.interrupt()
                await self._done.wait()
            end_s = self._now_s()
            self._lag.stop()
        finally:
            for timer in self._timers:
                timer.cancel()
            self._client.close()
        await self._metrics.stop()
        return load_record(
            self._plan,
            self._sent,
            self._counted,
            self._window,
            began_s=self._began_s,
            end_s=end_s,
            inside_at_start=(self._in_flight_at_start, self._area_at_start_s),
            lag=self._lag,
            metrics=self._metrics,
            stopped=self._stopped,
            url=self._target.url,
            run_id=self._run_id,
        )

    async def drain(self) -> None:
        """Wait until the engines are rid of what this run left, so that the next run meets idle ones."""
        if not (self._target.replicas and await self._metrics.drained(within_s=10.0)):
            await asyncio.sleep(1.0)

    # ---------------------------------------------------------------------------------------------------- sending

    def _start_load(self) -> None:
        if not self._is_closed:
            self._expect_next_arrival()
            return
        for user in range(self._users):
            self._let_user_send(user, 0.0, 0.0)

    def _let_user_send(self, user: int, from_s: float, pause_s: float) -> None:
        """Let a user think and send its next request."""
        k = self._next_of_user[user]
        self._next_of_user[user] = k + 1
        prepared = self._prepared.take(k * self._users + user)
        assert prepared is not None
        due_s = from_s + max(prepared.think_s, pause_s)
        if due_s <= self._now_s():
            self._send(prepared, due_s)
        else:
            self._at(due_s, partial(self._send, prepared, due_s))

    def _expect_next_arrival(self) -> None:
        """Send every request that is due, and wait for the next one."""
        while not self._done.is_set():
            prepared = self._prepared.take(len(self._sent))
            if prepared is None:
                self._exhausted = True
                if not self._client.active:
                    self._done.set()
                return
            due_s = prepared.request.sent_s
            if due_s > self._now_s():
                self._at(due_s, partial(self._on_arrival, prepared, due_s))
                return
            self._send(prepared, due_s)

    def _on_arrival(self, prepared: PreparedRequest, due_s: float) -> None:
        self._send(prepared, due_s)
        self._expect_next_arrival()

    def _send(self, prepared: PreparedRequest, due_s: float) -> None:
        if self._done.is_set():
            return
        if len(self._client.active) >= self._target.max_in_flight:
            self._stop(f"stopped with {len(self._client.active):,} requests in flight: the load exceeds the fleet")
            return
        request = prepared.request
        exchange = self._client.send(
            prepared.body, f"{self._run_id}-{request.request_id}", self._on_end, context=request
        )
        now_s = exchange.sent_s - self._began_s
        self._sent.append(Sent(request, prepared.prompt_tokens, exchange))
        self._counted.sent += 1
        self._counted.in_system.change(now_s, 1)
        self._lag.sent(due_s, now_s)
        self._prepared.make_ahead(min(self._lead, self._users + 1) if self._is_closed else 1)

    def _on_end(self, exchange: Exchange) -> None:
        ended_s = exchange.ended_s - self._began_s
        self._counted.in_system.change(ended_s, -1)
        before = self._counted.ended
        ended = self._counted.ended = before + 1
        self._completed += not exchange.failure
        if self._window.count(ended_s, before, ended):
            self._open_window(ended_s)
        if self._window.is_over(ended):
            self._done.set()
        if not self._completed and ended >= max(HOPELESS, self._users):
            self._stop(f"stopped after {ended:,} requests, of which not one completed")
        if self._done.is_set():
            return
        if self._is_closed:
            self._let_user_send(exchange.context.user_id, ended_s, _pause_s(exchange))
        elif self._exhausted and not self._client.active:
            self._done.set()

    # ----------------------------------------------------------------------------------------------------- the clock

    def _now_s(self) -> float:
        return monotonic() - self._began_s

    def _at(self, time_s: float, callback: Callable[[], None]) -> None:
        def fire() -> None:
            self._timers.discard(handle)
            callback()

        handle = self._loop.call_later(max(0.0, time_s - self._now_s()), fire)
        self._timers.add(handle)

    def _kill(self, outage: Outage) -> None:
        expert = self._plan.fleet.experts[outage.expert_index].name
        if self._target.kill is not None and not self._done.is_set():
            self._target.kill(expert, outage.replica_index, outage.for_s)

    def _open_window(self, now_s: float) -> None:
        self._window.open(now_s)
        self._in_flight_at_start = self._counted.in_system.count
        self._area_at_start_s = self._counted.in_system.area_until(now_s)
        self._lag.restart()
        self._metrics.restart()

    def _stop(self, why: str) -> None:
        if not self._done.is_set():
            self._stopped.append(why)
            self._done.set()

    def _tell_progress(self) -> None:
        if self._progress is None:
            return
        shares = [0.0]
        if self._plan.run.duration_s is not None:
            shares.append(self._now_s() / self._plan.run.duration_s)
        elif self._window.last:
            shares.append(self._counted.ended / self._window.last)
        elif self._plan.data.trace is not None:
            shares.append(self._counted.ended / len(self._plan.data.trace.arrival_s))
        self._progress(min(1.0, max(shares)))
        self._at(self._now_s() + PROGRESS_S, self._tell_progress)


def _pause_s(exchange: Exchange) -> float:
    """How long a user waits after this answer before sending again, however short its think time."""
    if not exchange.failure:
        return 0.0
    try:
        asked_s = float(exchange.headers.get("retry-after", 0))
    except ValueError:
        asked_s = 0.0
    return min(LONGEST_PAUSE_S, max(PAUSE_AFTER_FAILURE_S, asked_s))
