"""The load of a measured run as the simulation takes it, with what had to be assumed beyond the row."""

import re
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray

from calibrate.predictor import CannotPredictError
from calibrate.tables.lengths import PROMPT_STD_TOKENS, saturated_lengths
from calibrate.tables.measured_runs import MeasuredRequests, MeasuredRun
from calibrate.tables.run_engine import RunEngine
from sim.service_curve import IterationWork, ServiceCurve
from sim.spec import ClassSpec, ClosedLoop, Distribution, Empirical, Fixed, Lognormal, RunSpec, Trace, WorkloadSpec
from sim.streams import stream
from sim.traffic import TraceTable, WorkloadData

WARM_UP_GAP_S = 1.0  # between the prompts that fill the prefix cache before a later stage; each is answered alone
WARM_UP_OUTPUT_TOKENS = 2
WARM_UP_PAUSE_S = 30.0

SATURATED_RATE = 1.25  # arrivals over the rate at which the engine alone would serve them, prefill not counted
SATURATED_REQUESTS = 1000  # at least; the tail of ITL is made by few long prompts

_DISTINCT_PROMPTS = re.compile(r"(\d+) distinct prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayLoad:
    """A load ready to simulate.

    Attributes:
        load: as ``sim.simulation.RunPlan`` takes it: users, or NaN for a trace.
        first_request: number of the first one that counts; those before only fill the prefix cache.
        over_window: throughput is that of the measured window, not from the first arrival to the last token.
        random: another seed gives another load, so replications make sense.
        notes: assumptions.
    """

    workload: WorkloadSpec
    run: RunSpec
    data: WorkloadData
    load: float
    first_request: int
    over_window: bool
    random: bool
    notes: tuple[str, ...]


def replay_load(
    run: MeasuredRun, requests: MeasuredRequests | None, engine: RunEngine, curve: ServiceCurve, seed: int
) -> ReplayLoad:
    """Return the load of a run: its recorded requests where there are some, else what the row states.

    Raises:
        CannotPredictError: the row does not say what was sent.
    """
    match run.load_type:
        case "open_loop" | "burst":
            return _timed(run, requests, engine, seed)
        case "closed_loop":
            return _closed_loop(run, requests, seed)
        case _:
            return _saturated(run, engine, curve, seed)


# -------------------------------------------------------------------------------------------- open loops and bursts


def _timed(run: MeasuredRun, requests: MeasuredRequests | None, engine: RunEngine, seed: int) -> ReplayLoad:
    distinct = _distinct_prompts(run)
    notes: list[str] = []
    if requests is not None:
        arrival_s = requests.arrival_s - requests.arrival_s[0]
        prompt, output = _recorded_prompts(run, requests, notes), np.maximum(requests.output_tokens, 1)
    else:
        arrival_s = _stated_arrivals(run, notes, seed)
        prompt = _drawn(
            run.prompt_tokens_mean, _prompt_std(run, notes), distinct or len(arrival_s), stream(seed, "prompt_tokens")
        )
        if distinct:
            prompt = np.resize(prompt, len(arrival_s))
        output = _drawn(
            run.output_tokens_mean, _or(run.output_tokens_std, 0.0), len(arrival_s), stream(seed, "output_tokens")
        )
    prefix_id = prefix_tokens = None
    distinct = min(distinct, len(prompt))
    if engine.enable_prefix_caching and distinct:
        prefix_id = np.arange(len(prompt)) % distinct
        whole = np.array([np.median(prompt[prefix_id == index]) for index in range(distinct)]).astype(np.int64)
        prefix_tokens = whole[prefix_id]
        notes.append(f"{distinct} distinct prompts sent in turn, the cache {'warm' if run.stage else 'cold'} at first")
    elif engine.enable_prefix_caching and run.shared_prefix_tokens:
        prefix_id = np.zeros(len(prompt), np.int64)
        prefix_tokens = np.full(len(prompt), run.shared_prefix_tokens)
        distinct = 1
    warm_up = 0
    if run.stage and prefix_id is not None and prefix_tokens is not None:
        warm_up = distinct
        before_s = WARM_UP_GAP_S * np.arange(warm_up)
        arrival_s = np.concatenate([before_s, arrival_s + before_s[-1] + WARM_UP_PAUSE_S])
        prompt = np.concatenate([prompt[:warm_up], prompt])
        output = np.concatenate([np.full(warm_up, WARM_UP_OUTPUT_TOKENS), output])
        prefix_id = np.concatenate([prefix_id[:warm_up], prefix_id])
        prefix_tokens = np.concatenate([prefix_tokens[:warm_up], prefix_tokens])
    trace = TraceTable(
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        prefix_id=prefix_id,
        prefix_tokens=prefix_tokens,
    )
    return ReplayLoad(
        workload=_trace_workload(run),
        run=RunSpec(warm_up_requests=warm_up, seed=seed),
        data=WorkloadData(trace=trace),
        load=nan,
        first_request=warm_up,
        over_window=False,
        random=requests is None,
        notes=tuple(notes),
    )


def _stated_arrivals(run: MeasuredRun, notes: list[str], seed: int) -> NDArray[np.float64]:
    if run.n_requests is None:
        raise CannotPredictError("neither its requests nor their number (n_requests) are known")
    _need_lengths(run)
    if run.load_type == "burst":
        return np.zeros(run.n_requests)
    if not isfinite(run.rate_rps):
        raise CannotPredictError("neither its arrivals nor their rate (rate_rps) are known")
    notes.append("Poisson arrivals at the stated rate")
    return np.cumsum(stream(seed, "arrival_gaps").exponential(1 / run.rate_rps, run.n_requests))


def _recorded_prompts(run: MeasuredRun, requests: MeasuredRequests, notes: list[str]) -> NDArray[np.int64]:
    unknown = requests.prompt_tokens < 1
    if not unknown.any():
        return requests.prompt_tokens
    notes.append(f"{int(unknown.sum())} requests without a recorded length took the mean")
    return np.where(unknown, round(run.prompt_tokens_mean), requests.prompt_tokens)


# ------------------------------------------------------------------------------------------------------ closed loops


def _closed_loop(run: MeasuredRun, requests: MeasuredRequests | None, seed: int) -> ReplayLoad:
    if run.concurrency_limit is None:
        raise CannotPredictError("the number of users (concurrency_limit) is not known")
    if run.n_requests is None:
        raise CannotPredictError("the number of requests (n_requests) is not known")
    notes = ["users send again at once"]
    columns = {}
    prompt: Distribution
    output: Distribution
    if requests is not None:
        prompt, output = (Empirical(file=run.run_id, column=name) for name in ("prompt_tokens", "output_tokens"))
        columns[prompt.file, prompt.column] = np.sort(_recorded_prompts(run, requests, notes)).astype(np.float64)
        columns[output.file, output.column] = np.sort(np.maximum(requests.output_tokens, 1)).astype(np.float64)
        notes.append("prompt and output lengths drawn from the recorded ones, independently")
    else:
        _need_lengths(run)
        prompt = _spread(run.prompt_tokens_mean, _prompt_std(run, notes) / run.prompt_tokens_mean)
        output = _spread(run.output_tokens_mean, _or(run.output_tokens_std, 0.0) / run.output_tokens_mean)
    if _distinct_prompts(run):
        notes.append("repeated prompts are not simulated in a closed loop")
    lengths = ClassSpec(prompt_tokens=prompt, output_tokens=output, shared_prefix_tokens=run.shared_prefix_tokens or 0)
    users = run.concurrency_limit
    return ReplayLoad(
        workload=WorkloadSpec(classes={"measured": lengths}, load=ClosedLoop(users=users)),
        # The same number of requests, so that percentiles and a cold start weigh what they do in the measured sample.
        run=RunSpec(requests=run.n_requests, warm_up_requests=users if run.stage else 0, seed=seed),
        data=WorkloadData(columns=columns),
        load=float(users),
        first_request=0,
        over_window=True,
        random=True,
        notes=tuple(notes),
    )


def _saturated(run: MeasuredRun, engine: RunEngine, curve: ServiceCurve, seed: int) -> ReplayLoad:
    """Return arrivals a quarter faster than the engine's own rate, so that requests always wait in the engine.

    Users who wait for their answers would not do: where the front end is slower than the engine they wait there, and
    the batch that the measured runs kept full runs dry.
    """
    if not isfinite(run.output_tokens_mean):
        raise CannotPredictError("output lengths (out_len_mean) are not known")
    slots = engine.max_num_seqs
    lengths = saturated_lengths(run, engine.max_model_len)
    notes = [f"requests arrive faster than {slots} slots serve them", *lengths.notes]
    context = round(lengths.context_in_flight_tokens())
    batch = max(1, min(slots, engine.num_kv_blocks * engine.block_size // context))
    iteration_s = curve.iteration_s(IterationWork(0, 0, 0.0, 0, batch, batch * context))
    rate_rps = SATURATED_RATE * batch / (run.output_tokens_mean * iteration_s)
    warm_up, measured = 2 * slots, max(SATURATED_REQUESTS, 2 * slots)
    n = round(SATURATED_RATE * (warm_up + measured)) + 2 * slots
    trace = TraceTable(
        arrival_s=np.arange(n) / rate_rps,
        prompt_tokens=lengths.prompts(stream(seed, "prompt_tokens").standard_normal(n)),
        output_tokens=lengths.outputs(stream(seed, "output_tokens").standard_normal(n)),
    )
    return ReplayLoad(
        workload=_trace_workload(run),
        run=RunSpec(requests=measured, warm_up_requests=warm_up, seed=seed),
        data=WorkloadData(trace=trace),
        load=nan,
        first_request=0,
        over_window=True,
        random=True,
        notes=tuple(notes),
    )


# ------------------------------------------------------------------------------------------------------------ lengths


def _distinct_prompts(run: MeasuredRun) -> int:
    """Return how many prompts the client sends over and over, as ``prefix_note`` says; 0 when it does not."""
    found = _DISTINCT_PROMPTS.search(run.prefix_note)
    return 0 if found is None else int(found[1])


def _need_lengths(run: MeasuredRun) -> None:
    for column, value in (("in_len_mean", run.prompt_tokens_mean), ("out_len_mean", run.output_tokens_mean)):
        if not value >= 1:
            raise CannotPredictError(f"lengths ({column}) are not known")


def _prompt_std(run: MeasuredRun, notes: list[str]) -> float:
    if not isfinite(run.prompt_tokens_std):
        notes.append(f"standard deviation of prompts assumed {PROMPT_STD_TOKENS:g} tokens")
    return _or(run.prompt_tokens_std, PROMPT_STD_TOKENS)


def _drawn(mean: float, std: float, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.asarray(np.maximum(np.rint(rng.normal(mean, std, n)), 1), np.int64)


def _spread(mean: float, cv: float) -> Distribution:
    return Lognormal(mean=mean, cv=cv, min=1) if cv > 0 else Fixed(value=mean)


def _trace_workload(run: MeasuredRun) -> WorkloadSpec:
    lengths = ClassSpec(prompt_tokens=Fixed(value=1), output_tokens=Fixed(value=1))  # a trace brings its own
    return WorkloadSpec(classes={"measured": lengths}, load=Trace(file=run.run_id, format="timed_trace"))


def _or(value: float, otherwise: float) -> float:
    return value if isfinite(value) else otherwise
