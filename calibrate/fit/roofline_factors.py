"""Set the roofline's efficiency factors: ``python -m calibrate.fit.roofline_factors --ground-truth DIR``.

Kernels come from ``op_times.csv.gz`` (``calibrate.fit.kernel_factors``). What the host adds to an iteration is the
measured time per output token of light-load runs minus the kernels' time; what the front end adds to a request is the
measured TTFT of the same runs minus the iterations it spans. Both are read off ``serving_runs.csv``. Writes
``sim/data/roofline.json`` and prints predicted beside measured.
"""

import argparse
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from calibrate.fit import kernel_factors
from calibrate.fit.kernel_factors import Factor
from calibrate.tables.lengths import saturated_lengths
from calibrate.tables.measured_runs import run_of_settings
from sim.catalogue import find_gpu, find_model, find_quantization
from sim.factors import FORMAT_VERSION, Factors
from sim.roofline import Roofline
from sim.service_curve import IterationWork

Row: TypeAlias = dict[Hashable, Any]

_DEFAULT_OUT = Path(__file__).parents[2] / "sim" / "data" / "roofline.json"

_COMMAND = "python -m calibrate.fit.roofline_factors --ground-truth DIR"
_HOST_GPU = "H100-SXM-80GB"  # host overhead is set on this one alone; the other GPUs' rows are a check
_DISTINCT_PROMPTS = 100  # the load generator sent these over and over, so all but the first pass hits the prefix cache
_STAGE_S = 600.0  # of runs whose request count was not published
_BLOCK_TOKENS = 16
_MIN_SATURATED_TOKENS_PER_S = 14_500
_MAX_SATURATED_DECODES = 256
_ASYNC = "host_asynchronous"

OVERHEADS = ("per_iteration_s", "per_sequence_s", "filter_fixed_s", "top_p_passes", "top_k_passes")
PER_REQUEST_S = 1 / 1205
PER_PROMPT_TOKEN_S = 1e-6
COMPILED_LAUNCH_PER_LAYER_S = 0.12e-3


def main() -> None:
    """Read the measurements, write the factors, print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ground-truth", type=Path, required=True, help="folder with op_times.csv.gz and the runs")
    parser.add_argument("--out", type=Path, default=_DEFAULT_OUT, help="file to write (default: the packaged one)")
    arguments = parser.parse_args()
    ops = pd.read_csv(arguments.ground_truth / "op_times.csv.gz", low_memory=False)
    runs = pd.read_csv(arguments.ground_truth / "serving_runs.csv")
    splitwise = pd.read_csv(arguments.ground_truth / "splitwise_prompt_token_times.csv")
    factors = all_factors(ops, runs, splitwise)
    document = {
        "format_version": FORMAT_VERSION,
        "made_by": _COMMAND,
        "factors": {factor.name: {"value": _rounded(factor.value), "how": factor.how} for factor in factors},
    }
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    table = comparison(steady_runs(runs), _as_factors(factors))
    print(table.to_string(index=False, float_format="%.2f"))
    print()
    print(summary(table).to_string(float_format="%.1f"))
    print()
    print(prompt_comparison(splitwise, _as_factors(factors)).to_string(float_format="%.2f"))


def all_factors(ops: pd.DataFrame, runs: pd.DataFrame, splitwise: pd.DataFrame) -> list[Factor]:
    """Return every factor; the host's and the front end's build on the kernels'."""
    factors = [
        *kernel_factors.gemm_factors(ops),
        *kernel_factors.attention_factors(ops),
        *kernel_factors.all_reduce_factors(ops),
        *kernel_factors.elementwise_factors(ops),
        *kernel_factors.sampling_factors(ops),
        kernel_factors.eager_launch_factor(splitwise),
        Factor(
            "host.launch_per_layer_s",
            COMPILED_LAUNCH_PER_LAYER_S,
            "assumed, not measured: a third of the eager launch, for a compiled layer of some ten kernels and one call "
            "of the attention operator; a floor that large batches of 8B and larger models do not reach",
        ),
    ]
    open_loop, saturated = steady_runs(runs), saturated_runs(runs)
    light = open_loop[open_loop["gpu"] == _HOST_GPU]
    factors += [
        *overhead_factors(
            _ASYNC, light, "TPOT", factors, "unflagged dense open-loop stages", "vLLM 0.15.1, asynchronous"
        ),
        *overhead_factors(
            "host_synchronous",
            saturated[saturated["gpu"] == _HOST_GPU],
            "median ITL",
            factors,
            "saturated closed-loop runs of the ML.ENERGY leaderboard",
            "version and lengths of prompts not in the data: synchronous, lengths as in calibrate.tables.lengths",
        ),
    ]
    factors += front_end_factors(light, runs, factors)
    return factors


def steady_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the unflagged dense open-loop stages of vLLM 0.15.1 on GPUs of the catalogue."""
    rows = runs[
        (runs["load_type"] == "open_loop")
        & (runs["arch"] == "dense")
        & runs["flag"].isna()
        & runs["engine_version"].str.startswith("0.15.1")
    ].copy()
    # decoding requests by Little's law; an arriving one finds the others and adds itself (arrival theorem)
    rows["decodes"] = rows["rate_rps"] * rows["tpot_mean"] * (rows["out_len_mean"] - 1) + 1
    requests = rows["n_requests"].fillna(rows["rate_rps"] * _STAGE_S)
    rows["cold_share"] = np.where(rows["stage"] == 0, _DISTINCT_PROMPTS / requests, 0.0)
    return rows


def saturated_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the unflagged dense bf16 chat runs that keep a fixed number of requests running; steps without prefill.

    Their median gap between tokens is a step that decodes only: fewer than half the steps carry a prefill up to some
    250 requests at once, beyond which it is left out.
    """
    rows = runs[
        runs["run_id"].str.contains("mlenergy/.*/lm-arena-chat/", regex=True)
        & (runs["arch"] == "dense")
        & (runs["quantization"] == "none")
        & runs["flag"].isna()
        & (runs["concurrency_mean"] <= _MAX_SATURATED_DECODES)
        & ~runs["model"].str.contains("405B")  # not in the catalogue
    ]
    return rows.assign(
        decodes=rows["concurrency_mean"],
        in_len_mean=[_context_without_half_output(row) for row in rows.to_dict("records")],
        tpot_mean=rows["itl_p50"],
        rate_rps=0.0,
        cold_share=0.0,
    )


def _context_without_half_output(row: Row) -> float:
    """Return the prompt tokens that, with half the output, make the mean context of a request in flight."""
    run = run_of_settings(f"{name}={row[name]}" for name in ("model", "gpu", "workload", "out_len_mean"))
    lengths = saturated_lengths(run, find_model(row["model"]).max_model_len)
    return lengths.context_in_flight_tokens() - float(row["out_len_mean"]) / 2


def overhead_factors(
    group: str, rows: pd.DataFrame, measure: str, kernels: list[Factor], what: str, engine: str
) -> list[Factor]:
    """Return what the engine adds to the kernels: host time and sampling filters, from measured minus kernel time."""
    nothing = [Factor(f"{_ASYNC}.{name}", 0.0, "") for name in OVERHEADS]
    without = _as_factors([*kernels, *nothing])
    kernel_s = np.asarray([_tpot_s(row, without) for row in rows.to_dict("records")])
    measured_s, decodes = rows["tpot_mean"].to_numpy(float), rows["decodes"].to_numpy(float)
    models = [find_model(name) for name in rows["model"]]
    top_p = np.array([model.default_sampling == "top_p" for model in models], float)
    top_k = np.array([model.default_sampling == "top_k" for model in models], float)
    pass_s = [
        decodes_of * model.vocab_size * 4 / find_gpu(gpu).bandwidth_bytes_per_s
        for decodes_of, model, gpu in zip(decodes, models, rows["gpu"], strict=True)
    ]
    design = np.column_stack([np.ones_like(decodes), decodes, top_p + top_k, top_p * pass_s, top_k * pass_s])
    design /= measured_s[:, None]
    solution, _ = nnls(design, (measured_s - kernel_s) / measured_s)
    left = (kernel_s + design @ solution * measured_s) / measured_s - 1
    how = (
        f"measured {measure} minus kernel time over {len(rows)} {what} on {_HOST_GPU} ({engine}; {decodes.min():.0f} "
        f"to {decodes.max():.0f} decoding; {top_p.sum():.0f} of models with top-p, {top_k.sum():.0f} with top-k), "
        "non-negative least squares of the relative error; "
        f"median error left {np.median(np.abs(left)):.1%}, largest {np.max(np.abs(left)):.0%}"
    )
    return [Factor(f"{group}.{name}", float(value), how) for name, value in zip(OVERHEADS, solution, strict=True)]


def front_end_factors(rows: pd.DataFrame, runs: pd.DataFrame, factors: list[Factor]) -> list[Factor]:
    """Return the front end's cost per request from light-load TTFT, and per output token from saturated runs."""
    known = _as_factors(factors)
    light = rows[(rows["stage"] == 0) & rows["ttft_p50"].notna() & (rows["decodes"] < 40)]
    left_s = light["ttft_p50"].to_numpy(float) - np.asarray([_ttft_s(row, known) for row in light.to_dict("records")])
    left_s -= PER_PROMPT_TOKEN_S * light["in_len_mean"].to_numpy(float)
    delay_s = float(np.median(left_s)) - PER_REQUEST_S
    how_delay = (
        f"median over {len(light)} light-load stages on {_HOST_GPU} of the median TTFT minus half an iteration, a "
        f"whole one and the request's own (asynchronous scheduling) and minus tokenisation; {left_s.min() * 1e3:.1f} "
        f"to {left_s.max() * 1e3:.1f} ms; less per_request_s. HTTP, hand-over, the client's own time"
    )
    saturated = runs[
        runs["run_id"].str.startswith("mlenergy")
        & runs["flag"].isna()
        & (runs["out_tok_s"] > _MIN_SATURATED_TOKENS_PER_S)
    ]
    tokens_per_s = saturated["out_tok_s"]
    requests_per_s = tokens_per_s / saturated["out_len_mean"]
    per_token_s = float(((1 - requests_per_s * PER_REQUEST_S) / tokens_per_s).median())
    how_token = (
        f"one over output tokens per second, after the requests' share, of the {len(saturated)} fastest runs of one "
        f"engine ({tokens_per_s.min():.0f} to {tokens_per_s.max():.0f} tokens/s on B200 whatever the model, far below "
        "what the kernels allow, so one process sets the pace); a ceiling, be it the front end's or the engine core's"
    )
    return [
        Factor("front_end.delay_s", delay_s, how_delay),
        Factor(
            "front_end.per_request_s",
            PER_REQUEST_S,
            "CPU time a request takes in the production-stack router, like vLLM's API server a FastAPI application "
            "that parses, forwards and streams: 1,205 requests/s measured on one core with answers of one chunk",
        ),
        Factor(
            "front_end.per_prompt_token_s",
            PER_PROMPT_TOKEN_S,
            "assumed, not measured: a fast tokenizer encodes about a million tokens a second on one core",
        ),
        Factor("front_end.per_output_token_s", per_token_s, how_token),
    ]


def comparison(rows: pd.DataFrame, factors: Factors) -> pd.DataFrame:
    """Return predicted beside measured mean TPOT of each stage, in milliseconds."""
    predicted_ms = [1e3 * _tpot_s(row, factors) for row in rows.to_dict("records")]
    measured_ms = rows["tpot_mean"] * 1e3
    table = rows[["model", "gpu", "tp", "rate_rps", "decodes"]].assign(
        measured_ms=measured_ms, predicted_ms=predicted_ms, error_percent=(predicted_ms / measured_ms - 1) * 100
    )
    return table.astype({"tp": int})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, median absolute and largest absolute error in percent per GPU and over all."""
    everything = table.assign(gpu="all")
    both = pd.concat([table, everything])
    error = both.groupby("gpu")["error_percent"]
    return pd.DataFrame(
        {
            "stages": error.size(),
            "mean_error_percent": error.mean(),
            "median_absolute_percent": error.apply(lambda e: e.abs().median()),
            "mean_absolute_percent": error.apply(lambda e: e.abs().mean()),
            "largest_absolute_percent": error.apply(lambda e: e.abs().max()),
        }
    )


def prompt_comparison(splitwise: pd.DataFrame, factors: Factors) -> pd.DataFrame:
    """Return predicted over measured prompt time of Llama 2 70B (Splitwise, another engine of 2023: a check only)."""
    rows = splitwise[(splitwise["batch_size"] == 1) & splitwise["hardware"].isin(["a100-80gb", "h100-80gb"])]
    measured = rows.groupby(["hardware", "tensor_parallel", "prompt_tokens"])["prompt_time_ms"].median()
    lines = []
    for hardware, size, tokens, measured_ms in measured.reset_index().itertuples(index=False, name=None):
        curve = _curve("meta-llama/Llama-2-70b-hf", hardware.upper(), size, 256, factors)
        work = IterationWork(tokens, 1, tokens * (tokens + 1) / 2, tokens, 0, 0)
        lines.append((hardware, size, tokens, 1e3 * curve.iteration_s(work) / measured_ms))
    table = pd.DataFrame(lines, columns=["hardware", "tp", "prompt_tokens", "predicted / measured prompt time"])
    return table.pivot_table(index=["hardware", "tp"], columns="prompt_tokens")


def _tpot_s(row: Row, factors: Factors) -> float:
    """Return the mean time per output token at this stage's load: a decode step, and its share of prefills."""
    curve = _row_curve(row, factors)
    decode_s = curve.iteration_s(_work(row))
    warm_s = curve.iteration_s(_work(row, _mean_tail_tokens())) - decode_s
    cold_s = curve.iteration_s(_work(row, row["in_len_mean"])) - decode_s
    arrivals_per_iteration = row["rate_rps"] * decode_s
    return float(decode_s + arrivals_per_iteration * (warm_s + row["cold_share"] * cold_s))


def _ttft_s(row: Row, factors: Factors) -> float:
    """Return the engine's part of a median TTFT at light load, its prompt in the prefix cache.

    With asynchronous scheduling the next iteration is already scheduled when a request arrives: it waits for the rest
    of the one in flight and all of the next, then takes its own.
    """
    curve = _row_curve(row, factors)
    return 1.5 * curve.iteration_s(_work(row)) + curve.iteration_s(_work(row, _mean_tail_tokens()))


def _work(row: Row, prefill_tokens: float = 0.0) -> IterationWork:
    """Return an iteration of the stage's decodes, half their output written, and one chunk of this many new tokens."""
    decodes = round(row["decodes"])
    decode_kv_tokens = round(row["decodes"] * (row["in_len_mean"] + row["out_len_mean"] / 2))
    if not prefill_tokens:
        return IterationWork(0, 0, 0.0, 0, decodes, decode_kv_tokens)
    new, prompt = round(prefill_tokens), round(row["in_len_mean"])
    pairs = new * (prompt - new) + new * (new + 1) / 2
    return IterationWork(new, 1, pairs, prompt, decodes, decode_kv_tokens)


def _mean_tail_tokens() -> float:
    """Return the mean number of prompt tokens after the last whole cached block: 1 to a block, evenly."""
    return (1 + _BLOCK_TOKENS) / 2


def _row_curve(row: Row, factors: Factors) -> Roofline:
    return _curve(row["model"], row["gpu"], int(row["tp"]), int(row["max_num_seqs"]), factors)


def _curve(model: str, gpu: str, tensor_parallel_size: int, max_num_seqs: int, factors: Factors) -> Roofline:
    shape = find_model(model)
    return Roofline(
        shape,
        find_quantization("bf16"),
        find_gpu(gpu),
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        sampling_filter=shape.default_sampling,
        factors=factors,
    )


def _as_factors(factors: list[Factor]) -> Factors:
    return Factors({factor.name: factor.value for factor in factors})


def _rounded(value: float) -> float:
    """Return four significant digits; what is below a picosecond is a fit at its bound of zero."""
    return float(f"{value:.4g}") if abs(value) > 1e-12 else 0.0


if __name__ == "__main__":
    main()
