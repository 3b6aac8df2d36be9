"""One replica in simulated time: its front end, and its engine running iteration after iteration.

The engine (``sim.engine``) knows no time and the service curve knows no state; this is where they meet. A run of
decode-only iterations with the same requests is one event: iteration ``k`` of it takes ``fixed + slope * (kv + k * n)``
seconds, so the end of any iteration, and the iteration in flight at any moment, have closed forms.
"""

import sys
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isnan, nan, sqrt

import numpy as np
from numpy.typing import NDArray
from simpy import Environment
from simpy.events import Event, Timeout

from sim.chrome_trace import TracedIteration
from sim.engine import Batch, Engine
from sim.fleet import Expert
from sim.kv_cache import PrefixGroup
from sim.request import Request
from sim.stations import FrontEndStation, RouterStation

RUN_COLUMNS = ("start_s", "end_s", "iterations", "first_gap_s", "gap_step_s", "scheduled", "kv_blocks", "preempted")
"""What is logged of each run of iterations: its time; how many iterations; the seconds between a user's tokens, which
for iteration ``k`` are ``first_gap_s + k * gap_step_s``; scheduled requests and mean KV blocks in use per iteration;
requests preempted before it."""


@dataclass(frozen=True, slots=True)
class Averages:
    """Time averages of a replica's engine over a window (see ``sim.records.ReplicaStats``)."""

    utilization: float
    batch_size: float
    running: float
    kv_blocks: float
    preemptions: int
    iterations: int


class Replica:
    """One engine with its front end.

    Attributes:
        outstanding: requests routed here and not yet answered, kept by the router.
        is_up: whether its process is there.
        on_trial: the request whose first token will tell the router that it is back, if there is one.
        waited_s: time that admitted requests spent in the engine's waiting queue.
        settled_s: the start of the run in flight, or of the last one.
        most_kv_blocks: in use at the start of any iteration.
        largest_decodes, largest_kv_tokens, largest_prefill_tokens: of any iteration, to flag extrapolation.
    """

    def __init__(
        self,
        env: Environment,
        expert: Expert,
        expert_index: int,
        replica_index: int,
        *,
        router: RouterStation | None,
        network_s: float,
        user_network_s: float,
        deliver: Callable[[list[Request], float], None],
        on_trial_answer: Callable[[Request, float], None] = lambda request, time_s: None,
        step_by_step: bool = False,
        trace: list[TracedIteration] | None = None,
    ):
        """Build an idle replica.

        Args:
            env: the simulation's clock.
            expert: what it is a replica of.
            expert_index: of that expert in the fleet.
            replica_index: within the expert.
            router: through which its tokens pass, or None.
            network_s: one-way delay of a token from the front end to the router.
            user_network_s: one-way delay from the router to the user.
            deliver: called with the requests that finish together and the time their last tokens leave the router.
            on_trial_answer: called with the request on trial when its first token is made, and with the time at which
                the router has it.
            step_by_step: one event per iteration instead of per run; slow, to check the fast way against.
            trace: where to log every iteration, or None.
        """
        self.env = env
        self.expert = expert
        self.expert_index = expert_index
        self.replica_index = replica_index
        self.engine: Engine[Request] = Engine(expert.engine)
        self.front_end = FrontEndStation()
        self.outstanding = 0
        self.is_up = True
        self.on_trial: Request | None = None
        self._on_trial_answer = on_trial_answer
        self.waited_s = 0.0
        self._log = array("d")  # RUN_COLUMNS of each run, row by row
        self._runs = 0
        self._served_s = 0.0  # time that finished requests spent scheduled
        self.settled_s = 0.0
        self.most_kv_blocks = 0
        self.largest_decodes = 0
        self.largest_kv_tokens = 0
        self.largest_prefill_tokens = 0
        self.prefix_groups: dict[int, PrefixGroup] = {}  # by prefix number; of classes: -1 - index
        self._router = router if router is not None and router.streams_cost else None
        self._wakes_router = router is not None and router.wake_ups_cost
        self._per_output_token_s = expert.front_end.per_output_token_s
        self._per_request_engine_s = expert.front_end.per_request_engine_s
        self._network_s = network_s
        self._user_network_s = user_network_s
        self._deliver = deliver
        self._longest_run = 1 if step_by_step else sys.maxsize
        self._trace = trace
        self._due: deque[Request] = deque()  # passed the front end at engine_arrival_s, which may lie ahead
        self._event: Event | None = None  # the one that counts; a superseded one finds itself stale
        # The run in flight; its batch is None when the engine is idle.
        self._batch: Batch[Request] | None = None
        self._start_s = 0.0
        self._fixed_s = 0.0
        self._slope_s = 0.0  # per KV token
        self._length = 0  # iterations
        self._end_s = 0.0
        self._tokens = 0  # per iteration, streamed to users
        self._token_rate = 0.0
        self._wake_up_rate = 0.0
        self._emitted = 0  # iterations whose tokens the front end already has
        self._kv_blocks = 0  # in use at its start
        self._preempted = 0  # before it
        self._front_end_delay_s = 0.0
        self._delay_s = 0.0  # of the tokens delivered last, from the end of their iteration until they leave the router

    # -------------------------------------------------------------------------------------------- a request in

    def submit(self, request: Request) -> None:
        """Take a request that reaches the front end now."""
        now_s = self.env.now
        spec = self.expert.front_end
        if self._batch is not None and self._per_output_token_s and self._length > 1:
            self._hand_tokens_to_front_end(self._iterations_done(now_s))
        work_s = spec.per_request_s + request.prompt_tokens * spec.per_prompt_token_s
        request.front_end_start_s = self.front_end.take_request(now_s, work_s)
        arrival_s = request.front_end_start_s + work_s + spec.delay_s
        request.engine_arrival_s = request.queued_since_s = arrival_s
        self._due.append(request)
        if self._batch is None:
            if self._event is None:
                self._wake_at(arrival_s, self._on_arrival_when_idle)
        elif arrival_s < self._end_s and len(self._due) == 1 and self._length > 1 and not self.engine.waiting:
            self._cut_run(arrival_s)

    def _cut_run(self, arrival_s: float) -> None:
        """End the run with the iteration after which the engine sees an arrival."""
        length = self._iterations_done(arrival_s) + 1 + self.engine.lag
        if length < self._length:
            self._length = length
            self._end_s = self._end_of(length)
            self._wake_at(self._end_s, self._on_run_end)
            if self._router is not None:  # let the router get the tokens of the shorter run, no more and no fewer
                now_s = self.env.now
                left = self._tokens * length - self._token_rate * (now_s - self._start_s)
                self._change_token_rate(now_s, left / (self._end_s - now_s))

    def _wake_at(self, time_s: float, callback: Callable[[Event], None]) -> None:
        now_s = self.env.now
        event = Timeout(self.env, time_s - now_s if time_s > now_s else 0.0)
        event.callbacks.append(callback)
        self._event = event

    # ------------------------------------------------------------------------------------------- times in a run

    def _end_of(self, iterations: int) -> float:
        """When the first so many iterations of the run are done."""
        batch = self._batch
        assert batch is not None
        kv_tokens = iterations * batch.decode_kv_tokens + batch.decodes * (iterations * (iterations - 1) // 2)
        return self._start_s + iterations * self._fixed_s + self._slope_s * kv_tokens

    def _iterations_done(self, time_s: float) -> int:
        """How many iterations of the run have ended by then, at most all but the last."""
        batch = self._batch
        assert batch is not None
        if self._length == 1 or time_s <= self._start_s:
            return 0
        half = self._slope_s * batch.decodes / 2
        linear = self._fixed_s + self._slope_s * batch.decode_kv_tokens - half
        elapsed_s = time_s - self._start_s
        done = int(2 * elapsed_s / (linear + sqrt(linear * linear + 4 * half * elapsed_s)))
        # The closed form can be off by one through rounding.
        while self._end_of(done + 1) <= time_s:
            done += 1
        while done and self._end_of(done) > time_s:
            done -= 1
        return min(done, self._length - 1)

    def _hand_tokens_to_front_end(self, iterations: int) -> None:
        """Give the front end the tokens of the run up to this iteration that it does not have yet."""
        new = iterations - self._emitted
        if new > 0:
            last_end_s = self._end_s if iterations == self._length else self._end_of(iterations)
            first_end_s = last_end_s if new == 1 else self._end_of(self._emitted + 1)
            work_s = self._tokens * self._per_output_token_s
            self._front_end_delay_s = self.front_end.take_tokens(new, work_s, first_end_s, last_end_s)
            self._emitted = iterations

    # ------------------------------------------------------------------------------------------------- the runs

    def _on_arrival_when_idle(self, event: Event) -> None:
        if event is not self._event:
            return
        now_s = self.env.now
        self._event = None
        due = self._due
        while due and due[0].engine_arrival_s <= now_s:
            self.engine.add(due.popleft())
        self._start_run(now_s, per_request_s=0.0)

    def _on_run_end(self, event: Event) -> None:
        if event is not self._event:
            return
        batch = self._batch
        assert batch is not None
        engine = self.engine
        length, end_s = self._length, self._end_s
        if self._per_output_token_s:
            self._hand_tokens_to_front_end(length)
        delay_s = self._front_end_delay_s + self._network_s
        if self._router is not None:
            delay_s += self._router.token_delay_s(end_s, delay_s, self._tokens)
        run = self._runs
        chunks = batch.chunks
        for request, _ in chunks:
            if request.last_iteration >= 0:  # its prompt is complete
                self._note_first_token(request, run, end_s, end_s + delay_s)
        finished = engine.finish_run(length)

        slope_s, decodes = self._slope_s, batch.decodes
        used_blocks = engine.kv.num_blocks - engine.kv.free
        self._runs = run + 1
        self._log.fromlist(
            [
                self._start_s,
                end_s,
                length,
                # A delay that grew during the run stretched the gaps.
                self._fixed_s + slope_s * batch.decode_kv_tokens + (delay_s - self._delay_s) / length,
                slope_s * decodes,
                decodes + len(chunks),
                (self._kv_blocks + used_blocks) / 2,
                self._preempted,
            ]
        )
        self._delay_s = delay_s
        if self._trace is not None:
            self._trace_run(batch, length)

        due = self._due
        if due and due[0].engine_arrival_s < end_s:
            last_start_s = self._start_s if length == 1 else self._end_of(length - 1)
            while due and due[0].engine_arrival_s < end_s:
                request = due.popleft()
                engine.add(request, engine.iteration - (request.engine_arrival_s < last_start_s))
        self._start_run(end_s, per_request_s=self._per_request_engine_s)
        if finished:
            for request in finished:
                request.last_run = run
                request.last_token_engine_s = end_s
                # The router's backlog is foreseen and can come out too small, but no token overtakes the first.
                request.last_token_s = max(request.first_token_s, end_s + delay_s + self._user_network_s)
                self._served_s += end_s - request.scheduled_s - request.paused_s
            on_time = []
            for request in finished:
                if request.last_token_s > end_s + delay_s + self._user_network_s:
                    self._deliver([request], request.last_token_s - self._user_network_s)
                else:
                    on_time.append(request)
            if on_time:
                self._deliver(on_time, end_s + delay_s)

    def _note_first_token(self, request: Request, run: int, end_s: float, delivered_s: float) -> None:
        request.first_run = run
        if isnan(request.first_token_engine_s):
            request.first_token_engine_s = end_s
            request.first_token_s = delivered_s + self._user_network_s
            if request is self.on_trial:
                self.on_trial = None
                self._on_trial_answer(request, delivered_s)
        else:  # preempted before: one long gap
            gaps = request.gaps = request.gaps or []
            gaps.append(delivered_s - request.resumes_after_s)
            request.resumes_after_s = nan

    def _note_preemption(self, request: Request, now_s: float) -> None:
        request.queued_since_s = now_s
        if request.first_run >= 0:
            spans = request.spans = request.spans or []
            spans.append((request.first_run, self._runs - 1))
            request.first_run = -1
            request.resumes_after_s = now_s + self._delay_s

    def _note_admission(self, request: Request, now_s: float) -> None:
        waited_s = now_s - request.queued_since_s
        self.waited_s += waited_s
        if isnan(request.scheduled_s):
            request.scheduled_s = now_s
        else:
            request.paused_s += waited_s

    def _trace_run(self, batch: Batch[Request], length: int) -> None:
        assert self._trace is not None
        prefill_tokens = sum(tokens for _, tokens in batch.chunks)
        for done in range(length):
            start_s = self._end_of(done)
            self._trace.append(
                TracedIteration(
                    start_s=start_s,
                    duration_s=self._end_of(done + 1) - start_s,
                    prefill_tokens=prefill_tokens,
                    decodes=batch.decodes,
                    kv_usage=self._kv_blocks / self.engine.kv.num_blocks,
                    waiting=self.engine.queued,
                    prefills=len(batch.chunks),
                )
            )

    def _change_token_rate(self, now_s: float, tokens_per_s: float) -> None:
        router = self._router
        if router is not None:
            change, self._token_rate = tokens_per_s - self._token_rate, tokens_per_s
            if self._wakes_router:
                before_per_s, self._wake_up_rate = self._wake_up_rate, router.wake_ups_per_s(tokens_per_s, self._tokens)
                router.change_token_rate(now_s, change, self._wake_up_rate - before_per_s)
            else:
                router.change_token_rate(now_s, change)

    def _start_run(self, now_s: float, *, per_request_s: float) -> None:
        """Start what the engine schedules; it takes ``per_request_s`` longer for each request new in it."""
        engine = self.engine
        batch = self._batch = engine.schedule()
        if batch is None:
            if engine.queued:
                head = engine.waiting[0]
                raise RuntimeError(
                    f"expert {self.expert.name!r}: a request of {head.prompt_tokens} prompt tokens does not fit into "
                    f"{engine.kv.num_blocks} KV blocks of {engine.kv.block_size} tokens even alone"
                )
            self._change_token_rate(now_s, 0.0)
            self._event = None
            if self._due:
                self._wake_at(self._due[0].engine_arrival_s, self._on_arrival_when_idle)
            return
        self._preempted = 0
        if batch.preempted:
            self._preempted = len(batch.preempted)
            for request in batch.preempted:
                self._note_preemption(request, now_s)
        new = 0
        for request in batch.admitted:
            new += isnan(request.scheduled_s)
            self._note_admission(request, now_s)
        curve = self.expert.curve
        decodes = self._tokens = batch.decodes
        self._start_s = self.settled_s = now_s
        self._emitted = 0
        if batch.chunks:
            work = engine.work(batch)
            self._fixed_s = curve.iteration_s(work) + new * per_request_s
            self._slope_s = 0.0
            length = 1
            self._tokens += sum([request.last_iteration >= 0 for request, _ in batch.chunks])
            if work.prefill_tokens > self.largest_prefill_tokens:
                self.largest_prefill_tokens = work.prefill_tokens
            end_s = now_s + self._fixed_s
        elif not decodes:  # the only running request preempted itself: the engine computes nothing and looks again
            self._fixed_s = self._slope_s = 0.0
            length, end_s = 1, now_s
        else:
            kv_tokens = batch.decode_kv_tokens
            self._fixed_s, self._slope_s, until_kv_tokens = curve.decode_piece(decodes, kv_tokens)
            length = engine.run_length()
            if length > self._longest_run:
                length = self._longest_run
            if until_kv_tokens != inf:
                length = min(length, int((until_kv_tokens - kv_tokens) // decodes) + 1)
            self._length = length
            end_s = self._end_of(length)
            due = self._due
            if length > 1 and due and due[0].engine_arrival_s < end_s and not engine.waiting:
                # It left the front end's queue in advance, so no event announces it.
                length = min(length, self._iterations_done(due[0].engine_arrival_s) + 1 + engine.lag)
                end_s = self._end_of(length)
        self._length = length
        self._end_s = end_s
        if self._router is not None:
            self._change_token_rate(now_s, self._tokens * length / (end_s - now_s) if self._tokens else 0.0)
        if decodes > self.largest_decodes:
            self.largest_decodes = decodes
        if batch.decode_kv_tokens > self.largest_kv_tokens:
            self.largest_kv_tokens = batch.decode_kv_tokens
        self._kv_blocks = used_blocks = engine.kv.num_blocks - engine.kv.free
        if used_blocks > self.most_kv_blocks:
            self.most_kv_blocks = used_blocks
        self._wake_at(end_s, self._on_run_end)

    # ------------------------------------------------------------------------------------------------ its death

    def kill(self) -> list[Request]:
        """Lose the process, now: return the requests that were in it. Until it is up again it must get none."""
        now_s, engine, batch = self.env.now, self.engine, self._batch
        self.is_up = False
        self.on_trial = None
        running = list(engine.running)
        queued = [*engine.waiting, *engine.arriving, *self._due]
        if batch is not None:
            scheduled, done = batch.decodes + len(batch.chunks), self._iterations_done(now_s)
            self._log.fromlist([self._start_s, now_s, done, 0, 0, scheduled, self._kv_blocks, self._preempted])
            self._runs += 1
        for request in running:
            self._served_s += now_s - request.scheduled_s - request.paused_s
        for request in queued:
            if request.preemptions:
                self._served_s += request.queued_since_s - request.scheduled_s - request.paused_s
            self.waited_s += max(0.0, now_s - request.queued_since_s)
        self.settled_s = now_s
        self._change_token_rate(now_s, 0.0)
        self.front_end.lose_all(now_s)
        self.engine = Engine(self.expert.engine)
        self.prefix_groups.clear()
        self._due.clear()
        self._batch = self._event = None
        self._front_end_delay_s = self._delay_s = 0.0
        return running + queued

    # -------------------------------------------------------------------------------------------------- looking

    def runs(self) -> NDArray[np.float64]:
        """Return the log of all finished runs, shape (runs, RUN_COLUMNS)."""
        return np.frombuffer(self._log, np.float64).reshape(-1, len(RUN_COLUMNS))

    def waiting_area_until(self, time_s: float) -> float:
        """Return the integral of the number in the engine's waiting queue up to now."""
        queued = [*self.engine.waiting, *self.engine.arriving, *self._due]
        return self.waited_s + sum(max(0.0, time_s - request.queued_since_s) for request in queued)

    def averages(self, start_s: float, end_s: float) -> Averages:
        """Return time averages over a window; NaN where it has no length, or the engine never ran in it."""
        runs = self.runs()
        batch = self._batch
        if batch is not None:  # the run in flight, as far as it has come
            scheduled = batch.decodes + len(batch.chunks)
            now = (self._start_s, end_s, self._iterations_done(end_s), nan, nan, scheduled, self._kv_blocks, 0)
            runs = np.vstack([runs, now])
        first_s, last_s, iterations, _, _, scheduled_requests, kv_blocks, preempted = runs.T
        inside_s = np.clip(np.minimum(last_s, end_s) - np.maximum(first_s, start_s), 0, None)
        busy_s = float(inside_s.sum())
        window_s = end_s - start_s or nan
        began = (first_s >= start_s) & (first_s < end_s)
        return Averages(
            utilization=busy_s / window_s,
            batch_size=float(inside_s @ scheduled_requests) / busy_s if busy_s else nan,
            running=float(inside_s @ scheduled_requests) / window_s,
            kv_blocks=float(inside_s @ kv_blocks) / window_s,
            preemptions=int(preempted[began].sum()),
            iterations=int(iterations[began].sum()),
        )

    def scheduled_area_s(self) -> float:
        """Return the integral of the number of scheduled requests, run by run, until ``settled_s``."""
        runs = self.runs()
        return float((runs[:, 1] - runs[:, 0]) @ runs[:, RUN_COLUMNS.index("scheduled")])

    def time_in_engine_s(self) -> float:
        """Return how long requests were scheduled, request by request, until ``settled_s``."""
        running = sum(self.settled_s - request.scheduled_s - request.paused_s for request in self.engine.running)
        preempted = sum(
            request.queued_since_s - request.scheduled_s - request.paused_s
            for request in self.engine.waiting
            if request.preemptions
        )
        return self._served_s + running + preempted
