"""Measured runs made up from known corrections and overheads, for tests of the fit."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from calibrate.fit.observations import observe
from calibrate.fit.parameters import CORRECTIONS, OVERHEADS, group_of_version, overhead_columns
from calibrate.tables.measured_runs import MeasuredRun
from sim.catalogue import find_gpu, find_model, find_quantization
from sim.factors import OverheadFactors
from sim.roofline import Corrections, Roofline
from sim.service_curve import IterationWork

ENGINES = tuple(
    (model, gpu, size)
    for gpu in ("H100-SXM", "A100-80GB", "L40S")
    for model, size in (
        ("llama-3.1-8b", 1),
        ("llama-3.1-8b", 2),
        ("llama-2-7b", 1),
        ("codellama-34b", 2),
        ("qwen3-14b", 1),
        ("qwen3-14b", 4),
        ("llama-3.1-70b", 4),
        ("mistral-nemo-12b", 1),
    )
    if not (gpu == "L40S" and model == "llama-3.1-70b")
)
"""Model, GPU and tensor-parallel size; models with top-p, with top-k and without a filter."""

TRUTH = {
    "matrix": 0.95,
    "kv_read": 0.9,
    "prefill_attention": 1.05,
    "all_reduce": 0.8,
    "small_kernels": 1.2,
    "per_iteration_s": 300e-6,
    "per_sequence_s": 20e-6,
    "filter_fixed_s": 400e-6,
    "top_p_passes": 80.0,
    "top_k_passes": 120.0,
}
PROMPT_TOKENS, OUTPUT_TOKENS = 200.0, 400.0
VERSION = "0.15.1"


def loads(
    engines: Iterable[tuple[str, str, int]] = ENGINES, decodes: Iterable[int] = (6, 20, 92)
) -> list[tuple[MeasuredRun, int]]:
    """Return a run without measurements and its number of requests in flight, one experiment per engine.

    By default noise does not move the numbers in flight over a captured size of CUDA graphs, a step in the terms.
    """
    return [
        (
            MeasuredRun(
                run_id=f"made-up/{model}-{gpu}-{size}/s{stage}",
                exp=f"made-up/{model}-{gpu}-{size}",
                stage=stage,
                engine="vLLM",
                engine_version=VERSION,
                model=model,
                quantization="none",
                gpu=gpu,
                tp=size,
                arch="dense",
                load_type="open_loop",
                prefix_caching=True,
                max_num_seqs=256,
                max_num_batched_tokens=2048,
                prompt_tokens_mean=PROMPT_TOKENS,
                output_tokens_mean=OUTPUT_TOKENS,
            ),
            in_flight,
        )
        for model, gpu, size in engines
        for stage, in_flight in enumerate(decodes, start=1)  # of stage 0 some prompts would miss the prefix cache
    ]


def by_linear_model(load: tuple[MeasuredRun, int], truth: dict[str, float] = TRUTH) -> MeasuredRun:
    """Return a run with the time per output token that the fit's own linear model says."""
    run, in_flight = load
    # The terms follow from the number in flight, whatever time and rate it was made of.
    seen = observe(with_tpot(run, in_flight, 0.01))
    assert not isinstance(seen, str)
    values = np.zeros(len(seen.terms))
    values[: len(CORRECTIONS)] = [truth[name] for name in CORRECTIONS]
    values[overhead_columns(group_of_version(run.engine_version))] = [truth[name] for name in OVERHEADS]
    return with_tpot(run, in_flight, float(seen.terms @ values))


def by_roofline(load: tuple[MeasuredRun, int], truth: dict[str, float] = TRUTH) -> MeasuredRun:
    """Return a run with the time per output token of a corrected roofline at a steady number in flight.

    Of the iterations as many carry the tail of a cached prompt, one block at most, as requests arrive.
    """
    run, in_flight = load
    model = find_model(run.model)
    curve = Roofline(
        model,
        find_quantization("bf16"),
        find_gpu(run.gpu),
        tensor_parallel_size=run.tp,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        sampling_filter=model.default_sampling,
        corrections=Corrections(**{name: truth[name] for name in CORRECTIONS}),
        overhead=OverheadFactors(**{name: truth[name] for name in OVERHEADS}),
    )
    kv_tokens = round(in_flight * (PROMPT_TOKENS + OUTPUT_TOKENS / 2))
    tail, prompt = 8, int(PROMPT_TOKENS)
    pairs = float(sum(range(prompt - tail + 1, prompt + 1)))
    plain_s = curve.iteration_s(IterationWork(0, 0, 0.0, 0, in_flight, kv_tokens))
    mixed_s = curve.iteration_s(IterationWork(tail, 1, pairs, prompt, in_flight, kv_tokens))
    arrivals = (in_flight - 1) / (OUTPUT_TOKENS - 1)  # per iteration
    return with_tpot(run, in_flight, (1 - arrivals) * plain_s + arrivals * mixed_s)


def with_tpot(run: MeasuredRun, in_flight: int, tpot_s: float) -> MeasuredRun:
    """Return a run at the rate that keeps this many requests in flight: one arriving finds all but itself."""
    return replace(run, tpot_mean_s=tpot_s, rate_rps=(in_flight - 1) / tpot_s / (OUTPUT_TOKENS - 1))


def with_noise(runs: Iterable[MeasuredRun], spread: float, rng: np.random.Generator) -> list[MeasuredRun]:
    """Return runs with times that err by a relative ``spread``."""
    return [replace(run, tpot_mean_s=run.tpot_mean_s * float(np.exp(rng.normal(0, spread)))) for run in runs]


def row_of(run: MeasuredRun) -> dict[str, object]:
    """Return the cells of a table that hold what these runs hold."""
    columns = {
        "tpot_mean": run.tpot_mean_s,
        "in_len_mean": run.prompt_tokens_mean,
        "out_len_mean": run.output_tokens_mean,
    }
    same = (
        "run_id exp stage engine engine_version model quantization gpu tp arch load_type prefix_caching rate_rps flag"
    )
    return columns | {name: getattr(run, name) for name in (*same.split(), "max_num_seqs", "max_num_batched_tokens")}
