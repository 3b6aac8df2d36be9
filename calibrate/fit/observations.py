"""What a measured run says of iteration times: a time, and how much each parameter of a fit contributes to it.

A measured mean time per output token (or median gap between tokens) is the time of a decode iteration at the measured
concurrency, plus each iteration's share of prefills.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, floor, isnan

import numpy as np
from numpy.typing import NDArray

from calibrate.fit.parameters import (
    ASYNCHRONOUS,
    CORRECTIONS,
    GROUPS,
    OVERHEADS,
    V0,
    EngineGroup,
    group_of,
    overhead_columns,
)
from calibrate.predictor import CannotPredictError
from calibrate.tables.lengths import saturated_lengths
from calibrate.tables.measured_runs import MeasuredRun
from calibrate.tables.run_engine import shape_of
from sim.factors import Factors, OverheadFactors, packaged_factors
from sim.memory import engine_defaults
from sim.roofline import Corrections, Roofline
from sim.service_curve import CurveSource, IterationWork

DISTINCT_PROMPTS = 100
"""The load generator of the open-loop runs sent this many prompts over and over, so later ones hit the prefix cache."""
BLOCK_TOKENS = 16
V0_PREFILL_TOKENS = 4096  # its budget was the longer of 2,048 tokens and the model's length


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A measured iteration time and what each parameter contributes to it.

    Attributes:
        terms: shape (parameters,); their product with the parameters is the predicted time in seconds.
        decodes: mean number of requests decoding.
        kv_tokens: mean KV read per iteration.
    """

    run: MeasuredRun
    group: EngineGroup
    measured_s: float
    terms: NDArray[np.float64]
    decodes: float
    kv_tokens: float


@cache
def observe(run: MeasuredRun, factors: Factors | None = None) -> Observation | str:
    """Return what a run says of iteration times, or why nothing; ``factors`` None: the packaged kernel efficiencies."""
    if run.flag:
        return "flagged"
    if run.arch != "dense":
        return "a mixture of experts"
    if run.engine.casefold() != "vllm":
        return "an engine other than vLLM"
    if run.dp != 1:
        return "data parallel, several engines in one row"
    if run.load_type == "static_batch":
        step_s = run.e2e_mean_s / run.output_tokens_mean
        return _observation(run, factors, step_s, run.concurrency_mean, run.prompt_tokens_mean, 0.0)
    if run.load_type == "open_loop" and not isnan(run.tpot_mean_s):
        measured_s = run.tpot_mean_s
        # Little's law; an arriving request finds the others and adds itself (arrival theorem).
        decodes = run.rate_rps * measured_s * (run.output_tokens_mean - 1) + 1
        prompt_tokens = run.prompt_tokens_mean
        prefills_per_iteration = run.rate_rps * measured_s
    elif run.load_type == "saturated_closed_loop" and not isnan(run.itl_p50_s):
        measured_s = run.itl_p50_s
        decodes = run.concurrency_mean
        if run.max_num_seqs is not None and not decodes <= run.max_num_seqs:
            decodes = float(run.max_num_seqs)
        if decodes > run.output_tokens_mean / 2:
            return "half its iterations carry a prefill, which its median gap between tokens then holds"
        try:
            lengths = saturated_lengths(run, run.max_model_len or shape_of(run)[0].max_model_len)
        except CannotPredictError as error:
            return str(error)
        prompt_tokens = lengths.context_in_flight_tokens() - run.output_tokens_mean / 2
        prefills_per_iteration = 0.0
    else:
        return "no mean time per output token in an open loop, and no median gap in a saturated one"
    if "gpqa" in run.workload:
        return "prompts of unknown length with long outputs"
    if run.engine_version and group_of(run) is not ASYNCHRONOUS and run.load_type == "open_loop":
        return "an open loop on an engine before 0.14, too few and too short to fit"
    return _observation(run, factors, measured_s, decodes, prompt_tokens, prefills_per_iteration)


def _observation(
    run: MeasuredRun,
    factors: Factors | None,
    measured_s: float,
    decodes: float,
    prompt_tokens: float,
    prefills_per_iteration: float,
) -> Observation | str:
    context_tokens = prompt_tokens + run.output_tokens_mean / 2
    group = group_of(run)

    def iteration_s(curve: Roofline) -> float:
        if run.load_type == "static_batch":
            return _static_iteration_s(curve, run)
        return _steady_iteration_s(curve, run, decodes, context_tokens, prompt_tokens, prefills_per_iteration)

    try:
        if not Factors.is_measured(shape_of(run)[2]):
            return "a GPU whose kernels were not measured, so that its terms would stand for another's"
        contributions = _terms(run, group, factors or packaged_factors(), iteration_s)
    except CannotPredictError as error:
        return str(error)
    return Observation(
        run=run,
        group=group,
        measured_s=measured_s,
        terms=contributions,
        decodes=decodes,
        kv_tokens=decodes * context_tokens,
    )


def _terms(
    run: MeasuredRun, group: EngineGroup, factors: Factors, iteration_s: Callable[[Roofline], float]
) -> NDArray[np.float64]:
    """Return seconds per unit of each parameter: the roofline with that parameter at 1 and all others at 0."""
    linear = factors.without_launches()

    def seconds_of(parameter: str) -> float:
        corrections = Corrections(**{name: float(name == parameter) for name in CORRECTIONS})
        overhead = OverheadFactors(**{name: float(name == parameter) for name in OVERHEADS})
        curve = build_curve(run, group, corrections, overhead, factors=linear)
        return iteration_s(curve)

    terms = np.zeros(len(CORRECTIONS) + len(GROUPS) * len(OVERHEADS))
    terms[: len(CORRECTIONS)] = [seconds_of(name) for name in CORRECTIONS]
    terms[overhead_columns(group)] = [seconds_of(name) for name in OVERHEADS]
    return terms


def _steady_iteration_s(
    curve: Roofline,
    run: MeasuredRun,
    decodes: float,
    context_tokens: float,
    prompt_tokens: float,
    prefills_per_iteration: float,
) -> float:
    """Return the mean time of an iteration at a steady load: its decodes, and its share of prefills."""

    def at(batch: int) -> float:
        kv_tokens = round(batch * context_tokens)
        decode_s = curve.iteration_s(IterationWork(0, 0, 0.0, 0, batch, kv_tokens))
        if not prefills_per_iteration:
            return decode_s
        tail = tail_tokens()
        warm_s = curve.iteration_s(with_chunk(tail, prompt_tokens, batch, kv_tokens)) - decode_s
        cold_s = curve.iteration_s(with_chunk(prompt_tokens, prompt_tokens, batch, kv_tokens)) - decode_s
        cold = cold_share(run)
        return decode_s + prefills_per_iteration * ((1 - cold) * warm_s + cold * cold_s)

    low, high = max(1, floor(decodes)), max(1, ceil(decodes))
    return at(low) if low == high else at(low) * (high - decodes) + at(high) * (decodes - low)


def _static_iteration_s(curve: Roofline, run: MeasuredRun) -> float:
    """Return the time of a static batch, prefill and all, over its output tokens.

    The V0 engine prefills whole prompts, as many together as its token budget holds, before it decodes any.
    """
    batch, prompt, output = round(run.concurrency_mean), round(run.prompt_tokens_mean), round(run.output_tokens_mean)
    together = min(batch, max(1, V0_PREFILL_TOKENS // prompt))
    pairs = together * prompt * (prompt + 1) / 2
    prefill_s = (
        batch / together * curve.iteration_s(IterationWork(together * prompt, together, pairs, together * prompt, 0, 0))
    )
    kv_tokens = round(batch * (prompt + output / 2))
    decode_s = curve.iteration_s(IterationWork(0, 0, 0.0, 0, batch, kv_tokens))
    return (prefill_s + (output - 1) * decode_s) / output


def with_chunk(new_tokens: float, prompt_tokens: float, decodes: int, kv_tokens: int) -> IterationWork:
    """Return an iteration of these decodes and one chunk, the last ``new_tokens`` of a prompt."""
    new, prompt = max(1, round(new_tokens)), round(prompt_tokens)
    pairs = new * (prompt - new) + new * (new + 1) / 2
    return IterationWork(new, 1, pairs, prompt, decodes, kv_tokens)


def tail_tokens() -> float:
    """Return the mean number of prompt tokens after the last whole cached block: 1 to a block, evenly."""
    return (1 + BLOCK_TOKENS) / 2


def cold_share(run: MeasuredRun) -> float:
    """Return the share of an open-loop run's prompts that found no prefix in the cache."""
    if not run.prefix_caching:
        return 1.0
    if run.stage > 0:
        return 0.0
    return min(1.0, DISTINCT_PROMPTS / run.n_requests) if run.n_requests else 0.0


def build_curve(
    run: MeasuredRun,
    group: EngineGroup,
    corrections: Corrections,
    overhead: OverheadFactors,
    *,
    factors: Factors | None = None,
    source: CurveSource | None = None,
) -> Roofline:
    """Return the curve of a run's engine; ``factors`` and ``source`` as ``Roofline`` takes them.

    Raises:
        CannotPredictError: see ``shape_of``.
    """
    model, quantization, gpu = shape_of(run)
    tokens, seqs = engine_defaults(gpu)
    return Roofline(
        model,
        quantization,
        gpu,
        tensor_parallel_size=run.tp,
        max_num_seqs=run.max_num_seqs or seqs,
        max_num_batched_tokens=run.max_num_batched_tokens or tokens,
        async_scheduling=group.async_scheduling,
        # The V0 engine did not read a model's generation config.
        sampling_filter=None if group is V0 else model.default_sampling,
        kv_cache_dtype="fp8" if run.kv_dtype == "fp8" else "auto",
        factors=factors,
        overhead=overhead,
        corrections=corrections,
        source=source,
    )
