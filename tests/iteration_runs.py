"""Iteration records of an engine that is not there: the simulated scheduler with a known time for every iteration."""

from collections.abc import Callable, Sequence

import numpy as np

from calibrate.fit.iteration_fit import TermFit
from calibrate.measure.grid import Point
from calibrate.measure.iteration_records import SentRequest, counts_of
from real.experts.iteration_log import IterationLine
from sim.engine import Engine, EngineRequest
from sim.fleet import EngineSettings
from sim.service_curve import IterationWork

SETTINGS = EngineSettings(
    max_num_seqs=32,
    max_num_batched_tokens=512,
    max_model_len=2048,
    block_size=16,
    num_kv_blocks=4000,
    enable_prefix_caching=False,
    scheduler_reserve_full_isl=True,
    async_scheduling=False,
)

TRUTH = TermFit(
    terms={
        "per_iteration": 8e-3,
        "per_token": 4e-4,
        "per_attention_pair": 3e-7,
        "per_prefill_chunk": 2e-4,
        "per_decode": 3e-4,
        "per_kv_token": 2e-6,
    },
    floor_tokens=12,
    graph_sizes=(),
)


def seconds(work: IterationWork, fit: TermFit = TRUTH) -> float:
    return float(fit.predict_s(np.array([work], dtype=np.float64))[0])


def run_engine(
    sent: Sequence[SentRequest],
    settings: EngineSettings = SETTINGS,
    *,
    time_of: Callable[[IterationWork], float] = seconds,
    entry_s: Callable[[int], float] = lambda _: 0.0,
    host_s: Callable[[float], float] = lambda work_s: 0.1 * work_s,
    coming_s: float = 0.0,
    leaving_s: float = 0.0,
) -> tuple[list[IterationLine], list[SentRequest]]:
    """Serve requests that enter ``entry_s`` after they were sent; return the log and what users saw.

    ``host_s`` is what of an iteration the engine does not wait for the model. An iteration takes longer by ``coming_s``
    for each request that is sent while it runs, by ``leaving_s`` for each whose user gets the last token then.
    """
    engine: Engine[EngineRequest] = Engine(settings)
    requests = [EngineRequest(request.prompt_tokens, request.output_tokens) for request in sent]
    enters_s = [request.sent_s + entry_s(number) for number, request in enumerate(sent)]
    order = sorted(range(len(sent)), key=lambda number: enters_s[number])
    now_s = 0.0
    lines: list[IterationLine] = []
    finished = [(0.0, 0.0)] * len(sent)
    firsts: dict[int, float] = {}
    left = 0
    while True:
        while order and enters_s[order[0]] < now_s:
            in_flight = engine.iteration if settings.async_scheduling and lines else None
            engine.add(requests[order.pop(0)], in_flight)
        batch = engine.schedule()
        if batch is None:
            if not order:
                break
            now_s = enters_s[order[0]] + 1e-9
            left = 0
            continue
        work_s = time_of(engine.work(batch))
        counts = counts_of(batch)
        decoding = engine.decoding(batch.iteration)
        work_s += leaving_s * left
        longer_s = work_s
        while coming_s:  # what comes within the extension extends it further
            came = sum(now_s < request.sent_s <= now_s + longer_s for request in sent)
            if work_s + coming_s * came <= longer_s:
                break
            longer_s = work_s + coming_s * came
        work_s = longer_s
        now_s += work_s
        done = engine.finish_run(1)
        left = len(done)  # their users have their last tokens in the next one
        lines.append(
            IterationLine(0, len(lines), now_s, *counts, elapsed_s=work_s - host_s(work_s), kv_usage=None),
        )
        for request in [*decoding, *(r for r, _ in batch.chunks if r.last_iteration >= 0)]:
            firsts.setdefault(requests.index(request), now_s + 1e-4)
        for request in done:
            number = requests.index(request)
            finished[number] = (firsts[number], now_s + 1e-4)
    seen = [
        SentRequest(
            point=request.point,
            number=request.number,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            sent_s=request.sent_s,
            first_token_s=first_s,
            last_token_s=last_s,
            chunks=request.output_tokens,
        )
        for request, (first_s, last_s) in zip(sent, finished, strict=True)
    ]
    return lines, seen


def requests_of(point: Point, label: str) -> list[SentRequest]:
    """Return the requests of a point of steps, the late ones a while after the others."""
    asked = [(point.prompt_tokens, point.output_tokens, 0.0)] * point.requests
    asked += [(point.late_tokens, 2, 0.12 + 0.16 * number) for number in range(point.late)]
    return [
        SentRequest(point=label, number=number, prompt_tokens=prompt, output_tokens=output, sent_s=sent_s)
        for number, (prompt, output, sent_s) in enumerate(asked)
    ]
