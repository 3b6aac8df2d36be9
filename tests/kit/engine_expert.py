"""A stand-in for one vLLM server whose engine is known exactly: the simulator's own, in real time.

    python -m tests.kit.engine_expert --port P FILE EXPERT [--time-factor F]

Batches are those of ``sim.engine`` and an iteration lasts what the expert's service curve says, from the end of the one
before; only then are its tokens written. The tokenizer is the expert's. So of everything that a user of it waits for,
nothing is unknown but the router, the network, and this process's own work for requests and tokens. It speaks as
``tests.kit.mock_expert`` does, with vLLM's own figures at ``/metrics``.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from time import monotonic

import uvloop

from real.gateway.listener import Listener
from real.users.prompts import load_tokenizer
from sim.engine import Batch, Engine, EngineRequest
from sim.fleet import Expert
from sim.fleet_file import load_fleet
from sim.resolve import resolve_expert
from sim.service_curve import ScaledCurve, ServiceCurve
from sim.spec import ExpertSpec
from tests.kit.mock_expert import Behaviour, Connection, MockExpert, StreamedAnswer
from tests.kit.precise_timer import PreciseTimer

_LOOK_S = 0.02

EngineTimes = tuple[float, float, float, float]
"""Monotonic seconds at which a request arrived at its engine, was scheduled, had its first token, and its last."""


class EngineExpertRequest(EngineRequest):
    """A request of the engine, and the answer it makes."""

    __slots__ = ("answer", "arrived_s", "first_token_s", "scheduled_s")

    def __init__(self, answer: StreamedAnswer, arrived_s: float) -> None:
        super().__init__(answer.prompt_tokens, answer.tokens)
        self.answer = answer
        self.arrived_s = arrived_s
        self.scheduled_s = 0.0
        self.first_token_s = 0.0


class RealTimeEngine:
    """The engine, its clock, and sums of where requests spent their time, by the engine's own account."""

    def __init__(self, expert: Expert, curve: ServiceCurve, log: Path | None) -> None:
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._settings = expert.engine
        self._curve = curve
        self._engine: Engine[EngineExpertRequest] = Engine(expert.engine)
        self._batch: Batch[EngineExpertRequest] | None = None
        self._end_s = 0.0  # of the iteration under way, by the curve
        self._late: list[EngineExpertRequest] = []  # came after that end, before this process looked at the clock
        self._timer = PreciseTimer(self._on_time)
        self._loop = asyncio.get_running_loop()
        self.iterations = self.preemptions = self.finished = 0
        self.queue_s = self.prefill_s = self.decode_s = 0.0

    def add(self, answer: StreamedAnswer) -> None:
        """Queue a request, as of now."""
        now_s = monotonic()
        request = EngineExpertRequest(answer, now_s)
        if self._batch is None:
            self._engine.add(request)
            self._begin(now_s)
        elif now_s < self._end_s:
            self._engine.add(request, self._engine.iteration)
        else:
            self._late.append(request)

    def _on_time(self) -> None:
        # What has arrived by now is read before the engine looks at its queue.
        self._loop.call_soon(self._end)

    def _end(self) -> None:
        batch, end_s, engine = self._batch, self._end_s, self._engine
        assert batch is not None
        first = [request for request, _ in batch.chunks if request.last_iteration >= 0]
        decoding = engine.decoding(batch.iteration)
        finished = engine.finish_run(1)
        self.iterations += 1
        for request in first:
            if not request.first_token_s:
                request.first_token_s = end_s
                self.prefill_s += end_s - request.scheduled_s
        self._begin(end_s)
        for request in (*decoding, *first):  # in the order of admission, as the scheduler keeps them
            if not request.answer.over:
                request.answer.token()
        for request in finished:
            self.decode_s += end_s - request.first_token_s
            self.finished += 1
            if self._log is not None:
                times_s = (request.arrived_s, request.scheduled_s, request.first_token_s, end_s)
                os.write(self._log, json.dumps([request.answer.request_id, *times_s]).encode() + b"\n")

    def _begin(self, now_s: float) -> None:
        engine = self._engine
        left = [request for request in engine.running if request.answer.over]
        if len(left) == len(engine.running) and any(each.answer.sent < each.output_tokens for each in left):
            engine = self._without_listeners()
        batch = self._batch = engine.schedule()
        late, self._late = self._late, []
        if batch is None:
            if late:  # the engine was idle when they came
                for request in late:
                    engine.add(request)
                self._begin(late[0].arrived_s)
            return
        for request in late:
            engine.add(request, engine.iteration)
        self.preemptions += len(batch.preempted)
        for request in batch.admitted:
            if not request.scheduled_s:
                request.scheduled_s = now_s
                self.queue_s += now_s - request.arrived_s
        self._end_s = now_s + self._curve.iteration_s(engine.work(batch))
        self._timer.set(self._end_s)

    def _without_listeners(self) -> Engine[EngineExpertRequest]:
        """An idle engine with what still waits: all who ran have left, as when a load ends."""
        waiting = [*self._engine.waiting, *self._engine.arriving]
        self._engine = Engine(self._settings)
        for request in waiting:
            if not request.answer.over:
                self._engine.add(request)
        return self._engine

    def metrics(self) -> str:
        """Figures under vLLM's names."""
        engine = self._engine
        figures = {
            "num_requests_running": len(engine.running),
            "num_requests_waiting": engine.queued + len(self._late),
            "kv_cache_usage_perc": engine.kv_usage,
            "num_preemptions_total": self.preemptions,
            "iteration_tokens_total_count": self.iterations,
            "request_queue_time_seconds_sum": self.queue_s,
            "request_prefill_time_seconds_sum": self.prefill_s,
            "request_decode_time_seconds_sum": self.decode_s,
            "request_decode_time_seconds_count": self.finished,
        }
        return "".join(f'vllm:{name}{{engine="0"}} {value}\n' for name, value in figures.items())


class EngineConnection(Connection):
    """A connection that answers what vLLM tells of itself as well."""

    def on_message_complete(self) -> None:
        path, engine = self.url.decode(), self.expert.engine
        if path == "/metrics" and isinstance(engine, RealTimeEngine):
            self.respond(200, engine.metrics().encode(), {"content-type": "text/plain"})
        elif path == "/version":
            self.respond(200, json.dumps({"version": "of the simulator, in real time"}).encode())
        else:
            super().on_message_complete()


async def serve(
    port: int, name: str, spec: ExpertSpec, time_factor: float, log: Path | None, order: Path | None
) -> None:
    """Listen until the process ends."""
    expert = resolve_expert(name, spec)
    curve = expert.curve if time_factor == 1 else ScaledCurve(expert.curve, time_factor)
    tokenizer = load_tokenizer(spec)
    mock = MockExpert(name, RealTimeEngine(expert, curve, log), Behaviour(late_head=True), None)
    mock.count = lambda text: len(tokenizer.encode(text).ids)
    if order is not None:
        print("loaded", flush=True)
        while not order.exists():
            await asyncio.sleep(_LOOK_S)
        await asyncio.sleep(max(0.0, float(order.read_text()) - monotonic()))
    listener = Listener("127.0.0.1", port, lambda: EngineConnection(mock))
    print("ready", flush=True)
    await asyncio.Event().wait()
    listener.close()


def read_log(path: Path) -> dict[str, EngineTimes]:
    """What an expert noted of each request it finished, by the request's id."""
    rows = (json.loads(line) for line in path.read_text().splitlines()) if path.exists() else ()
    return {row[0]: tuple(row[1:]) for row in rows}


def main() -> None:
    """Serve one replica."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("expert")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--time-factor", type=float, default=1.0, help="on every iteration's time")
    parser.add_argument("--log", type=Path, help="gets a JSON line a request, [id, times], see read_log")
    parser.add_argument("--order", type=Path, help="listen only when this file is there, at its time.monotonic()")
    arguments = parser.parse_args()
    fleet = next(iter(load_fleet(arguments.file).fleets.values()))
    sys.setswitchinterval(0.01)
    spec = fleet.experts[arguments.expert]
    uvloop.run(serve(arguments.port, arguments.expert, spec, arguments.time_factor, arguments.log, arguments.order))


if __name__ == "__main__":
    main()
