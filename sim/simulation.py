"""One fleet at one load in one replication: users, router and replicas on one clock."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simpy import Environment
from simpy.events import Event, Timeout

from sim.chrome_trace import TracedIteration
from sim.failover import Failover, failures_text
from sim.fleet import Fleet
from sim.kv_cache import PrefixGroup
from sim.measuring import IN_STEP, NOT_WARM, Window, in_step, rare_garbage_collection, replication_seed, unsteady
from sim.recorder import Recorder
from sim.records import COMPLETED, FAILED, IN_FLIGHT, ReplicaStats, RouterStats, RunRecord
from sim.replica import Replica
from sim.request import Failure, Request
from sim.routing import confusion, replica_choice
from sim.self_checks import Counted, check_run
from sim.spec import ClosedLoop, OpenLoop, RouterSpec, RunSpec, WorkloadSpec
from sim.stations import RouterStation
from sim.streams import stream
from sim.traffic import ClosedLoopTraffic, OpenTraffic, TraceTraffic, WorkloadData
from sim.users import ClosedLoopUsers, arriving_requests

PROGRESS_STEPS = 50
TOO_LONG = 400  # HTTP status of a request that an engine refuses
MAX_IN_FLIGHT = 200_000
"""Requests in flight at which an open loop or a trace is stopped: far beyond what any fleet here holds, and memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What one run simulates.

    Attributes:
        load: users of a closed loop, requests per second of an open loop; NaN for a trace.
        step_by_step: simulate every iteration as an event of its own (slow; to check the fast way against).
        trace: (expert index, replica index) of the replica whose iterations to log, or None.
        taken_for: the class that the classifier takes each request for, where its prompt is known; None: drawn as the
            router's ``accuracy`` and ``confusion`` have it.
    """

    fleet: Fleet
    workload: WorkloadSpec
    run: RunSpec
    data: WorkloadData = field(default_factory=WorkloadData)
    load: float
    replication: int = 0
    step_by_step: bool = False
    trace: tuple[int, int] | None = None
    taken_for: Callable[[Request], int] | None = None


class Simulation:
    """Builds the stations of a plan; ``run`` simulates it once.

    Attributes:
        traced: iterations of the traced replica.
        replicas: of all experts, in order.
        counted: requests sent, ended, in the system and at the router, counted event by event.
    """

    def __init__(self, plan: RunPlan, progress: Callable[[float], None] | None = None):
        """Set up the run; ``progress`` is called now and then with the share of it that is done."""
        self.traced: list[TracedIteration] = []
        self.counted = Counted()
        self._plan = plan
        self._progress = progress
        self._env = env = Environment()
        self._seed = replication_seed(plan.run.seed, plan.replication)
        self._recorder = Recorder()
        self._active: dict[int, Request] = {}

        spec = plan.fleet.router
        self.router = RouterStation(spec, _service_factors(spec, self._seed)) if spec is not None else None
        self._user_network_s = spec.user_network_s if spec else 0.0
        self._expert_network_s = spec.expert_network_s if spec else 0.0
        by_expert = [
            [
                Replica(
                    env,
                    expert,
                    expert_index,
                    replica_index,
                    router=self.router,
                    network_s=self._expert_network_s,
                    user_network_s=self._user_network_s,
                    deliver=self._deliver,
                    on_trial_answer=self._on_trial_answer,
                    step_by_step=plan.step_by_step,
                    trace=self.traced if plan.trace == (expert_index, replica_index) else None,
                )
                for replica_index in range(expert.replicas)
            ]
            for expert_index, expert in enumerate(plan.fleet.experts)
        ]
        self.replicas = [replica for replicas in by_expert for replica in replicas]
        self._choose = replica_choice(plan.fleet, by_expert, self._seed)
        self._failover = (
            Failover(
                env,
                plan.fleet,
                by_expert,
                self._seed,
                forward=self._forward,
                fail=self._fail,
                in_router=lambda: self.counted.in_system.count,
            )
            if plan.fleet.outages
            else None
        )
        self._misroute = plan.taken_for or confusion(spec, list(plan.workload.classes), self._seed)
        self._shared_prefix_tokens = [spec.shared_prefix_tokens for spec in plan.workload.classes.values()]

        self._users: ClosedLoopUsers | None = None
        self._arrivals: Iterator[Request] = iter(())
        self._window = Window(plan.workload, plan.run, plan.load)
        self._progress_step = max(1, (self._window.last or 0) // PROGRESS_STEPS)
        self._at_start = [(0.0, 0.0) for _ in self.replicas]  # waiting area, front-end busy time
        self._router_busy_at_start_s = 0.0
        self._router_area_at_start_s = 0.0
        self._latest_at_start_s = 0.0
        self._latest_s = 0.0  # when the user had the last token of the request that ended last
        self._in_flight_at_start = 0
        self._system_area_at_start_s = 0.0
        self._stopped = ""
        self._done = env.event()

    def run(self) -> RunRecord:
        """Simulate, check the outcome, and return its record.

        Raises:
            SelfCheckError: the outcome breaks conservation or Little's law; a defect of the simulator.
        """
        plan, env = self._plan, self._env
        self._start_load()
        if self._window.opens_at_s == 0:
            self._open_window(0.0)
        elif self._window.opens_at_s is not None:
            self._at(self._window.opens_at_s, lambda event: self._open_window(env.now))
        with rare_garbage_collection():
            env.run(until=self._done if plan.run.duration_s is None else plan.run.duration_s)
        return self._record()

    # ---------------------------------------------------------------------------------------------------- users

    def _start_load(self) -> None:
        plan = self._plan
        if isinstance(plan.workload.load, ClosedLoop):
            users = int(plan.load)
            self._users = ClosedLoopUsers(ClosedLoopTraffic(plan.workload, users, self._seed, plan.data), users)
            starts: dict[float, list[Request]] = {}
            for user in range(users):
                request, start_s = self._users.next_request(user)
                request.sent_s = start_s
                self._active[request.request_id] = request
                starts.setdefault(start_s, []).append(request)
            for start_s, requests in starts.items():
                self._at(start_s + self._user_network_s, self._on_router_arrivals, requests)
            return
        if isinstance(plan.workload.load, OpenLoop):
            self._arrivals = arriving_requests(OpenTraffic(plan.workload, plan.load, self._seed, plan.data))
        else:
            self._arrivals = arriving_requests(TraceTraffic(plan.workload, plan.data, self._seed))
        self._expect_next_arrival()

    def _expect_next_arrival(self) -> None:
        request = next(self._arrivals, None)
        if request is not None:
            self._active[request.request_id] = request
            self._at(request.sent_s + self._user_network_s, self._on_open_arrival, [request])

    def _on_open_arrival(self, event: Event) -> None:
        if len(self._active) > MAX_IN_FLIGHT:
            if not self._done.triggered:
                self._stopped = f"stopped with {len(self._active):,} requests in flight: the load exceeds the fleet"
                self._done.succeed()
            return
        self._expect_next_arrival()
        self._on_router_arrivals(event)

    def _send_next(self, answered: list[Request]) -> None:
        """Let users whose answers leave the router now think and send again."""
        users = self._users
        assert users is not None
        there_s = self._user_network_s
        back_s = self._env.now + there_s
        groups: list[tuple[float, list[Request]]] = []
        together: list[Request] = []
        together_at_s = nan
        for before in answered:
            request, think_s = users.next_request(before.user_id)
            if before.failure is not None:
                think_s = max(think_s, before.failure.pause_s)
            self._active[request.request_id] = request
            request.sent_s = sent_s = back_s + think_s
            if sent_s != together_at_s:
                together, together_at_s = [], sent_s
                groups.append((sent_s + there_s, together))
            together.append(request)
        for arrival_s, requests in groups:
            if arrival_s > self._env.now:
                self._at(arrival_s, self._on_router_arrivals, requests)
            else:
                self._take_in(requests)

    # --------------------------------------------------------------------------------------- the way of a request

    def _at(self, time_s: float, callback: Callable[[Event], None], value: object = None) -> None:
        now_s = self._env.now
        Timeout(self._env, time_s - now_s if time_s > now_s else 0.0, value).callbacks.append(callback)

    def _on_router_arrivals(self, event: Event) -> None:
        requests: Any = event.value
        self._take_in(requests)

    def _take_in(self, requests: list[Request]) -> None:
        now_s = self._env.now
        self.counted.sent += len(requests)
        self.counted.in_system.change(now_s, len(requests))
        router = self.router
        if router is None:
            for request in requests:
                self._send_to_expert(request, now_s)
            return
        self.counted.at_router.change(now_s, len(requests))
        for request in requests:
            request.router_start_s, request.router_end_s = router.take_request(now_s, request.prompt_tokens)
            self._at(request.router_end_s, self._on_routed, request)

    def _on_routed(self, event: Event) -> None:
        now_s = self._env.now
        self.counted.at_router.change(now_s, -1)
        request: Any = event.value
        if self._misroute is not None:
            request.routed_class_index = self._misroute(request)
        self._send_to_expert(request, now_s)

    def _send_to_expert(self, request: Request, now_s: float) -> None:
        if self._failover is not None:
            self._failover.take(request)
            return
        replica = request.replica = self._choose(request)
        replica.outstanding += 1
        if self._expert_network_s:
            self._at(now_s + self._expert_network_s, self._on_expert_arrival, request)
        else:
            self._submit(request, replica)

    def _forward(self, request: Request) -> None:
        self._at(self._env.now + self._expert_network_s, self._on_expert_arrival, request)

    def _on_expert_arrival(self, event: Event) -> None:
        request: Any = event.value
        if self._failover is None or self._failover.reaches(request):
            self._submit(request, request.replica)

    def _on_trial_answer(self, request: Request, at_router_s: float) -> None:
        failover = self._failover
        assert failover is not None
        self._at(at_router_s, lambda event: failover.trial_answered(request))

    def _submit(self, request: Request, replica: Replica) -> None:
        if request.prompt_tokens + request.output_tokens > replica.expert.engine.max_model_len:
            # The engine refuses it at once, as vLLM does with status 400.
            refused_s = self._env.now + self._expert_network_s
            request.last_token_s = refused_s + self._user_network_s
            self._at(refused_s, self._on_refused, request)
            return
        if request.prefix is None:
            key, shared_tokens = -1 - request.class_index, self._shared_prefix_tokens[request.class_index]
        else:
            key, shared_tokens = request.prefix
        if shared_tokens:
            group = replica.prefix_groups.get(key)
            if group is None:
                group = PrefixGroup(shared_tokens, replica.expert.engine.block_size)
                replica.prefix_groups[key] = group
            request.group = group
        replica.submit(request)

    def _on_refused(self, event: Event) -> None:
        request: Any = event.value
        request.failure = Failure(TOO_LONG)
        self._end([request], FAILED)

    def _fail(self, request: Request) -> None:
        request.last_token_s = self._env.now + self._user_network_s
        self._end([request], FAILED)

    def _deliver(self, finished: list[Request], leaves_router_s: float) -> None:
        self._at(leaves_router_s, self._on_answered, finished)

    def _on_answered(self, event: Event) -> None:
        finished: Any = event.value
        self._end(finished, COMPLETED)

    def _end(self, requests: list[Request], status: int) -> None:
        now_s = self._env.now
        self.counted.in_system.change(now_s, -len(requests))
        for request in requests:
            if request.replica is not None:
                request.replica.outstanding -= 1
            del self._active[request.request_id]
            self._recorder.add(request, status)
        if self._failover is not None:
            for request in requests:
                self._failover.ended(request, status)
        self._latest_s = requests[-1].last_token_s
        before = self.counted.ended
        ended = self.counted.ended = before + len(requests)
        if self._window.count(now_s, before, ended):
            self._open_window(now_s)
        last = self._window.last
        if last is not None:
            if self._progress is not None and ended // self._progress_step > before // self._progress_step:
                self._progress(min(1.0, ended / last))
            if self._window.is_over(ended):
                if not self._done.triggered:
                    self._done.succeed()
                return
        if self._users is not None:
            self._send_next(requests)
        elif not self._active:
            self._done.succeed()  # a trace is over

    # --------------------------------------------------------------------------------------------- what came of it

    def _open_window(self, now_s: float) -> None:
        self._window.open(now_s)
        self._latest_at_start_s = self._latest_s
        self._in_flight_at_start = self.counted.in_system.count
        self._system_area_at_start_s = self.counted.in_system.area_until(now_s)
        self._at_start = [(r.waiting_area_until(now_s), r.front_end.busy_until(now_s)) for r in self.replicas]
        if self.router is not None:
            self._router_busy_at_start_s = self.router.busy_until(now_s)
        self._router_area_at_start_s = self.counted.at_router.area_until(now_s)

    def _record(self) -> RunRecord:
        plan, end_s = self._plan, self._env.now
        notes = list(plan.data.notes)
        if isnan(self._window.start_s):
            notes.append(NOT_WARM)
            self._window.open(end_s)
        if self._stopped:
            notes.append(self._stopped)
        for request in self._active.values():
            if request.sent_s <= end_s:
                self._recorder.add(request, IN_FLIGHT)
        requests = self._recorder.requests()
        in_flight = requests["status"] == IN_FLIGHT
        for name, column in requests.items():
            if name.endswith("_s"):
                column[in_flight & (column > end_s)] = nan  # known to the simulator, but not yet happened
        requests["http_status"][in_flight & np.isnan(requests["first_token_s"])] = 0
        if self._failover is not None:
            notes.append(self._fates(requests))
        start_user_s = 0.0
        if self._window.start_s:
            start_user_s = max(self._window.start_s + self._user_network_s, self._latest_at_start_s)
        # The clock reaches a time by adding delays, so the last answer may lie a rounding error behind it.
        window_s = (start_user_s, max(end_s + self._user_network_s, self._latest_s))
        length_s = window_s[1] - window_s[0]
        in_system = self.counted.in_system
        notes += unsteady(
            requests,
            window_s,
            closed_loop=self._users is not None,
            inside=(in_system.area_until(end_s) - self._system_area_at_start_s) / length_s if length_s > 0 else nan,
            in_flight_at_start=self._in_flight_at_start,
            in_flight_at_end=in_system.count,
        )
        if in_step(plan.workload, plan.load):
            notes.append(IN_STEP)
        notes += [note for replica in self.replicas for note in _extrapolations(replica)]
        checks = check_run(
            self.counted, requests, self.replicas, end_s, self._user_network_s, plan.fleet.router is not None
        )
        return RunRecord(
            fleet=plan.fleet.name,
            load_kind=plan.workload.load.kind,
            load=plan.load,
            replication=plan.replication,
            expert_names=tuple(expert.name for expert in plan.fleet.experts),
            class_names=tuple(plan.workload.classes),
            requests=requests,
            gaps=self._recorder.gaps(requests, self.replicas, window_s),
            window_s=window_s,
            replicas=tuple(
                _replica_stats(replica, before, self._window.start_s, end_s)
                for replica, before in zip(self.replicas, self._at_start, strict=True)
            ),
            router=self._router_stats(end_s),
            notes=tuple(dict.fromkeys(notes)),
            checks=checks,
        )

    def _fates(self, requests: dict[str, NDArray[Any]]) -> str:
        """Say what became of requests as replicas died."""
        assert self._failover is not None
        failed = Counter(requests["http_status"][requests["status"] == FAILED].tolist())
        again = f"{self._failover.second_tries:,} tried once more on another replica"
        return f"outages: {failures_text(failed)}; {again}"

    def _router_stats(self, end_s: float) -> RouterStats | None:
        spec = self._plan.fleet.router
        if self.router is None or spec is None:
            return None
        second_tries = 0 if self._failover is None else self._failover.second_tries
        window_s = end_s - self._window.start_s
        if not window_s:
            return RouterStats(utilization=nan, requests=nan, second_tries=second_tries)
        busy_s = self.router.busy_until(end_s) - self._router_busy_at_start_s
        in_router = (self.counted.at_router.area_until(end_s) - self._router_area_at_start_s) / window_s
        return RouterStats(utilization=busy_s / window_s / spec.workers, requests=in_router, second_tries=second_tries)


def _service_factors(spec: RouterSpec, seed: int) -> Callable[[], float]:
    """Return a source of factors of mean 1 and the router's coefficient of variation (gamma)."""
    if not spec.service_cv:
        return lambda: 1.0
    rng = stream(seed, "router_service")
    shape = spec.service_cv**-2

    def factors() -> Iterator[float]:
        while True:
            yield from (rng.standard_gamma(shape, 4096) / shape).tolist()

    return factors().__next__


def _replica_stats(replica: Replica, at_start: tuple[float, float], start_s: float, end_s: float) -> ReplicaStats:
    waiting_area_s, front_end_busy_s = at_start
    averages = replica.averages(start_s, end_s)
    window_s = end_s - start_s or nan
    blocks = replica.engine.kv.num_blocks
    source = replica.expert.curve.source
    widening = source.widening(*_largest_work(replica))
    return ReplicaStats(
        expert_index=replica.expert_index,
        replica_index=replica.replica_index,
        utilization=averages.utilization,
        batch_size=averages.batch_size,
        running=averages.running,
        waiting=(replica.waiting_area_until(end_s) - waiting_area_s) / window_s,
        kv_usage=averages.kv_blocks / blocks,
        kv_usage_max=replica.most_kv_blocks / blocks,
        front_end_utilization=(replica.front_end.busy_until(end_s) - front_end_busy_s) / window_s,
        preemptions=averages.preemptions,
        iterations=averages.iterations,
        iteration_error=source.error_p90 * widening,
        range_widening=widening,
    )


def _extrapolations(replica: Replica) -> Iterator[str]:
    source = replica.expert.curve.source
    error = source.error_p90
    # How much larger it is here differs from run to run, and a note that does not is shown once for all of them.
    inside = f"; inside, 90 % of iteration times are within {error:.1%}, here within the summary's iteration_error"
    for what, seen, fitted in (
        ("decode batches", replica.largest_decodes, source.max_decodes),
        ("KV reads per iteration", replica.largest_kv_tokens, source.max_decode_kv_tokens),
        ("prefill tokens per iteration", replica.largest_prefill_tokens, source.max_prefill_tokens),
    ):
        if fitted is not None and seen > fitted:
            yield (
                f"extrapolated: {what} went beyond the {fitted:,} that profile {source.label} was fitted up to"
                + (inside if error == error else "")
            )


def _largest_work(replica: Replica) -> tuple[int, int, int]:
    return replica.largest_decodes, replica.largest_kv_tokens, replica.largest_prefill_tokens
