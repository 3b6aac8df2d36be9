"""Kernel efficiencies from measured operator times: share of the datasheet's bandwidth and rate that kernels reach.

Each function takes rows of ``op_times.csv.gz`` (see the README beside the data) and returns factors for
``sim/data/roofline.json``. Fits minimise the logarithm of predicted over measured time with a soft-L1 loss, so that
short and long kernels count alike and outliers little.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from sim.catalogue import Gpu, find_gpu
from sim.factors import Factors

Floats: TypeAlias = NDArray[np.float64]

_MIN_GEMM_WEIGHTS, _MAX_GEMM_WEIGHTS = 4e6, 3e8  # the block matrices of 1B to 70B models at TP 1 to 8
_L2_BYTES = (1e6, 128e6)  # repeated benchmarks may find KV of this size in the L2 cache, a real step does not
_MAX_MESSAGE_BYTES = 2**27  # 8,192 tokens of a 70B model
_MAX_OWN_KERNEL_BYTES = 2**23  # vLLM hands larger messages to NCCL
_NCCL_GPU, _NCCL_SOURCE = "H100-SXM-80GB", "microsoft/vidur"
_PCIE_BETWEEN_PAIRS = {"A100 pairwise NVLink": 32e9, "H100 pairwise NVLink": 64e9}  # PCIe 4.0 and 5.0, 16 lanes
_PAIRED_GPUS = 4
_MOST_GPUS_OF_OWN_KERNEL_OVER_PCIE = 2
_VLLM_KERNELS = "vllm_"


class Factor(NamedTuple):
    """One named number and how it was set."""

    name: str
    value: float
    how: str


def gemm_factors(ops: pd.DataFrame) -> list[Factor]:
    """Matrix products, per architecture and format: fixed time, bandwidth and rate efficiency, overlap exponent."""
    rows = ops[(ops["op"] == "gemm") & (ops["n"] * ops["k"]).between(_MIN_GEMM_WEIGHTS, _MAX_GEMM_WEIGHTS)]
    factors: list[Factor] = []
    for (architecture, dtype), group in rows.groupby([_architectures(rows), "dtype"]):
        label = "fp8" if dtype == "fp8" else "bf16"
        value_bytes = 1 if label == "fp8" else 2
        m, n, k = (group[column].to_numpy(float) for column in ("m_tokens", "n", "k"))
        moved_bytes = n * k * value_bytes + m * (k * value_bytes + n * 2)
        memory_s = moved_bytes / _bandwidths(group)
        compute_s = 2 * m * n * k / _rates(group, label)

        def gemm_s(p: Floats, memory_s: Floats = memory_s, compute_s: Floats = compute_s) -> Floats:
            return np.asarray(p[0] + ((memory_s / p[1]) ** p[3] + (compute_s / p[2]) ** p[3]) ** (1 / p[3]))

        fitted, spread = _fit(gemm_s, _seconds(group), [3e-6, 0.8, 0.7, 3.0], [0, 0.1, 0.1, 1], [3e-5, 1, 1, 20])
        how = f"fit of {_gpus(group)}: {len(group)} GEMMs, {_MIN_GEMM_WEIGHTS:.0e} to {_MAX_GEMM_WEIGHTS:.0e} weights, "
        how += f"1 to 16,384 rows; {spread}"
        names = ("fixed_s", "bandwidth_efficiency", "rate_efficiency", "overlap_exponent")
        factors += _named(f"{architecture}.gemm_{label}", names, fitted, how)
    return factors


def attention_factors(ops: pd.DataFrame) -> list[Factor]:
    """Attention, per architecture and KV format: rates from prefill kernels, the rest from decode kernels."""
    rows = ops[
        ops["kernel"].str.startswith(_VLLM_KERNELS, na=False) & (ops["n_q_heads"] >= 8) & (ops["head_dim"] == 128)
    ]
    factors: list[Factor] = []
    for (architecture, dtype), group in rows.groupby([_architectures(rows), "kv_dtype"]):
        label = "fp8" if dtype == "fp8" else "bf16"
        value_bytes = 1 if label == "fp8" else 2
        decode = group[(group["op"] == "attn_decode") & (group["kv_len"] >= 16)]
        kv_bytes = _kv_bytes(decode, value_bytes)
        decode = decode[(kv_bytes < _L2_BYTES[0]) | (kv_bytes > _L2_BYTES[1])]
        read_s = _kv_bytes(decode, value_bytes) / _bandwidths(decode)
        batch = decode["batch"].to_numpy(float)

        def decode_s(p: Floats, batch: Floats = batch, read_s: Floats = read_s) -> Floats:
            return np.asarray(p[0] + p[1] * batch + read_s / p[2])

        fitted, spread = _fit(decode_s, _seconds(decode), [1e-5, 5e-8, 0.8], [0, 0, 0.05], [1e-4, 1e-6, 1])
        how = f"fit of {_gpus(decode)}: {len(decode)} decode kernels, KV below 1 MB or above 128 MB (not in L2), "
        how += f"batch 1 to 2,048, at least 8 query heads; {spread}"
        names = ("fixed_s", "per_sequence_s", "bandwidth_efficiency")
        group_name = f"{architecture}.attention_{label}_kv"
        factors += _named(group_name, names, fitted, how)

        prefill = group[(group["op"] == "attn_prefill") & (group["q_len"] >= 64) & (group["batch"] <= 32)]
        q_len, requests = prefill["q_len"].to_numpy(float), prefill["batch"].to_numpy(float)
        width = (prefill["n_q_heads"] * prefill["head_dim"]).to_numpy(float)
        compute_s = 4 * requests * width * q_len * (q_len + 1) / 2 / _rates(prefill, "bf16")
        moved_s = requests * q_len * 2 * width * 2 / _bandwidths(prefill)
        kv_s = _kv_bytes(prefill, value_bytes) / _bandwidths(prefill) / fitted[2]

        def prefill_s(
            p: Floats, compute_s: Floats = compute_s, moved_s: Floats = moved_s, kv_s: Floats = kv_s
        ) -> Floats:
            return np.asarray(p[0] + compute_s / p[1] + moved_s / p[2] + kv_s)

        fitted, spread = _fit(prefill_s, _seconds(prefill), [1e-5, 0.6, 0.4], [0, 0.05, 0.02], [1e-4, 1, 1])
        how = (
            f"fit of {_gpus(prefill)}: {len(prefill)} causal prefill kernels, 64 to 16,384 tokens, up to 32 requests; "
        )
        how += spread
        factors += _named(group_name, ("rate_efficiency", "query_bandwidth_efficiency"), fitted[1:], how)
    return factors


def all_reduce_factors(ops: pd.DataFrame) -> list[Factor]:
    """All-reduce, per kind of link and size: vLLM's kernel inside CUDA graphs, and NCCL for large messages.

    Over PCIe vLLM's kernel was measured where vLLM itself does not use it: it disables it on more than two GPUs without
    NVLink (``custom_all_reduce.py``) and leaves messages of more than 8 MiB to NCCL. There the rows show 1 to 2 GB/s of
    a link of 32 GB/s, which no prefill pays. NCCL's ring over PCIe was measured on four GPUs that have NVLink only
    pair by pair, so that its slowest hop, which sets the pace, is PCIe.
    """
    rows = ops[(ops["op"] == "all_reduce") & (ops["kernel"] == "vLLM_custom_graph")]
    nccl = ops[(ops["op"] == "all_reduce") & (ops["gpu"] == _NCCL_GPU) & ops["source"].eq(_NCCL_SOURCE)]
    nccl = nccl[nccl["bytes"] >= _MAX_OWN_KERNEL_BYTES]
    factors: list[Factor] = []
    for (link, tp), group in rows.groupby([_links(rows), "tp"]):
        size = int(str(tp).removesuffix(".0"))
        name = f"{link}.all_reduce_tp{size}"
        limit = _MAX_MESSAGE_BYTES if link == "ampere" else _MAX_OWN_KERNEL_BYTES
        own, how = _all_reduce_fit(group[group["bytes"] <= limit], size)
        how = f"{how}, vLLM's kernel in a graph"
        if link == "hopper" and (nccl["tp"] == tp).any():
            large, how_large = _all_reduce_fit(nccl[nccl["tp"] == tp], size)
            how_large += f", NCCL (Vidur) from {_MAX_OWN_KERNEL_BYTES / 2**20:.0f} MiB on, where vLLM's kernel ends"
        elif link == "pcie" and ops["gpu"].isin(list(_PCIE_BETWEEN_PAIRS)).any():
            large, how_large = _nccl_over_pcie(ops, size)
            if size > _MOST_GPUS_OF_OWN_KERNEL_OVER_PCIE:
                own, how = large, f"vLLM disables its kernel on more than two GPUs linked by PCIe: NCCL; {how_large}"
        else:
            large, how_large = own, "no measured NCCL over such links: vLLM's kernel is taken at every size"
        factors += _named(name, ("fixed_s", "link_efficiency"), own, how)
        factors += _named(name, ("nccl_fixed_s", "nccl_link_efficiency"), large, how_large)
    return factors


def _nccl_over_pcie(ops: pd.DataFrame, size: int) -> tuple[Floats, str]:
    """Return fixed seconds and share of the link of NCCL's ring whose slowest hop is PCIe."""
    rows = ops[(ops["op"] == "all_reduce") & ops["gpu"].isin(list(_PCIE_BETWEEN_PAIRS)) & (ops["tp"] == _PAIRED_GPUS)]
    rows = rows[rows["bytes"] <= _MAX_MESSAGE_BYTES]
    links = np.asarray(rows["gpu"].map(_PCIE_BETWEEN_PAIRS), np.float64)
    fitted, how = _ring_fit(rows, _PAIRED_GPUS, links)
    how += (
        f", NCCL (Vidur) over {_PAIRED_GPUS} GPUs with NVLink only pair by pair, whose ring passes over PCIe; the "
        f"fixed time times {size - 1}/{_PAIRED_GPUS - 1} for the hops of a ring of {size} (assumed), the share of the "
        "link as measured (assumed to hold on servers of other GPUs, whose slots may share lanes)"
    )
    return fitted * [(size - 1) / (_PAIRED_GPUS - 1), 1.0], how


def _all_reduce_fit(rows: pd.DataFrame, size: int) -> tuple[Floats, str]:
    """Return fixed seconds and link efficiency of all-reduces over these GPUs' own links."""
    return _ring_fit(rows, size, _per_gpu(rows, lambda gpu: gpu.link_bandwidth_bytes_per_s))


def _ring_fit(rows: pd.DataFrame, size: int, links: Floats) -> tuple[Floats, str]:
    """Return fixed seconds and link efficiency; a ring moves ``2 (n - 1) / n`` of the message over each link."""
    moved_s = 2 * (size - 1) / size * rows["bytes"].to_numpy(float) / links

    def all_reduce_s(p: Floats) -> Floats:
        return np.asarray(p[0] + moved_s / p[1])

    fitted, spread = _fit(all_reduce_s, _seconds(rows), [5e-6, 0.4], [0, 1e-3], [1e-3, 1])
    return fitted, f"fit of {_gpus(rows)}: {len(rows)} all-reduces; {spread}"


def elementwise_factors(ops: pd.DataFrame) -> list[Factor]:
    """Norms, rotary embedding and activation of one layer: fixed time, and bandwidth per architecture."""
    small = ops[ops["gpu"].str.startswith("RTX") & (ops["m_tokens"] <= 16)]
    counts = {"layernorm": 2, "rotary_emb": 1, "act_fn": 1}
    fixed_s = sum(
        count * float(small.loc[small["op"] == op, "time_us"].median()) * 1e-6 for op, count in counts.items()
    )
    how_fixed = "sum of medians of vLLM's kernels on RTX 4090 and RTX PRO 6000 (LLMServingSim), 1 to 16 tokens: "
    how_fixed += "two norms, rotary embedding, activation"

    widths = {"meta-llama/Llama-2-7b-hf": (4096, 11008, 8192), "meta-llama/Llama-3.1-8B": (4096, 14336, 5120)}
    large = ops[ops["model"].isin(list(widths)) & (ops["m_tokens"] >= 1024) & (ops["tp"] == 1)]
    large = large[~large["gpu"].isin(["H100-80GB", "RTXPRO6000-96GB"])]  # another library's kernels; no datasheet entry
    factors: list[Factor] = []
    for architecture, group in large.groupby(_architectures(large)):
        shapes = np.asarray([widths[model] for model in group["model"]])
        hidden, intermediate, rotated = shapes.T
        op = group["op"]
        # numbers read and written per token; vLLM's norm adds the residual as well, Vidur's does not
        values = np.select(
            [
                op == "layernorm",
                op.isin(["input_layernorm", "post_attention_layernorm"]),
                op == "add",
                op.isin(["rotary_emb", "attn_rope"]),
                op.isin(["act_fn", "mlp_act"]),
            ],
            [4 * hidden, 2 * hidden, 3 * hidden, 2 * rotated, 3 * intermediate],
            default=0,
        )
        peak_s = group["m_tokens"].to_numpy(float) * values * 2 / _bandwidths(group)
        known = values > 0
        value = min(1.0, float(peak_s[known].sum() / _seconds(group)[known].sum()))
        how = f"bytes over time of {known.sum()} kernels on {_gpus(group)}, 1,024 tokens and more, summed; at most 1"
        factors += [
            Factor(f"{architecture}.elementwise.fixed_s", fixed_s, how_fixed),
            Factor(f"{architecture}.elementwise.bandwidth_efficiency", value, how),
        ]
    return factors


def sampling_factors(ops: pd.DataFrame) -> list[Factor]:
    """Sampling: fixed time, and how often it moves the FP32 logits; one set, measured on one GPU."""
    vocab_size = 128256  # of Llama 3.1, which these rows are of
    rows = ops[(ops["op"] == "sampler") & ops["gpu"].str.startswith("RTX4090")]
    pass_s = rows["batch"].to_numpy(float) * vocab_size * 4 / find_gpu("RTX-4090").bandwidth_bytes_per_s

    def sampling_s(p: Floats) -> Floats:
        return np.asarray(p[0] + p[1] * pass_s)

    fitted, spread = _fit(sampling_s, _seconds(rows), [2e-5, 1.5], [0, 0], [1e-3, 20])
    how = f"fit of {len(rows)} sampler times on RTX 4090 (LLMServingSim), batch 1 to 256; {spread}"
    return _named("sampling", ("fixed_s", "passes"), fitted, how)


def eager_launch_factor(splitwise: pd.DataFrame) -> Factor:
    """Launch of one layer without graphs or compilation, from runs that more GPUs do not speed up."""
    layers = 80  # of Llama 2 70B, which these rows are of
    rows = splitwise[
        (splitwise["hardware"] == "h100-80gb") & (splitwise["tensor_parallel"] == 8) & (splitwise["batch_size"] == 1)
    ]
    value = float(rows["token_time_ms"].median()) * 1e-3 / layers
    how = (
        f"median decode step of Llama 2 70B on 8 H100, batch 1, over {layers} layers ({len(rows)} rows of Splitwise, "
        "vLLM of 2023 without graphs): 8 GPUs are no faster than 4 there, so launches set the pace; now an upper bound"
    )
    return Factor("host.eager_launch_per_layer_s", value, how)


def _fit(
    predict_s: Callable[[Floats], Floats], measured_s: Floats, start: list[float], low: list[float], high: list[float]
) -> tuple[Floats, str]:
    """Return the parameters and, in words, the spread of predicted over measured."""

    def log_error(p: Floats) -> Floats:
        return np.asarray(np.log(predict_s(p) / measured_s))

    result = least_squares(
        log_error, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=np.abs(np.asarray(start))
    )
    error = predict_s(result.x) / measured_s - 1
    tails = np.percentile(error, [5, 95])
    median = float(np.median(np.abs(error)))
    return result.x, f"median error {median:.1%}, 90 % within {tails[0]:+.0%} and {tails[1]:+.0%}"


def _named(group: str, names: tuple[str, ...], values: Floats, how: str) -> list[Factor]:
    return [Factor(f"{group}.{name}", float(value), how) for name, value in zip(names, values, strict=True)]


def _seconds(rows: pd.DataFrame) -> Floats:
    return rows["time_us"].to_numpy(float) * 1e-6


def _kv_bytes(rows: pd.DataFrame, value_bytes: int) -> Floats:
    factors = rows[["batch", "kv_len", "n_kv_heads", "head_dim"]].to_numpy(float)
    return np.asarray(factors.prod(axis=1) * 2 * value_bytes)


def _per_gpu(rows: pd.DataFrame, figure: Callable[[Gpu], float]) -> Floats:
    return rows["gpu"].map(lambda name: figure(find_gpu(name))).to_numpy(float)


def _bandwidths(rows: pd.DataFrame) -> Floats:
    return _per_gpu(rows, lambda gpu: gpu.bandwidth_bytes_per_s)


def _rates(rows: pd.DataFrame, dtype: str) -> Floats:
    return _per_gpu(rows, lambda gpu: (gpu.fp8_per_s if dtype == "fp8" else None) or gpu.bf16_per_s)


def _architectures(rows: pd.DataFrame) -> "pd.Series[str]":
    return rows["gpu"].map(lambda name: Factors.architecture(find_gpu(name))).rename("architecture")


def _links(rows: pd.DataFrame) -> "pd.Series[str]":
    return rows["gpu"].map(lambda name: Factors.link(find_gpu(name))).rename("link")


def _gpus(rows: pd.DataFrame) -> str:
    return ", ".join(sorted(rows["gpu"].unique()))
