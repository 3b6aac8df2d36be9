"""Experts by their catalogue names: which can exist, which were measured, which come with the package."""

from collections.abc import Sequence

from calibrate.tables.measured_runs import MeasuredRun
from calibrate.tables.run_engine import shape_of
from sim.catalogue import find_gpu, find_model, find_quantization
from sim.memory import block_size_of, engine_defaults, memory_budget
from sim.resolve import DEFAULT_MAX_MODEL_LEN
from sim.spec import EngineSpec

ExpertKey = tuple[str, str, str, int]
"""Model, quantization, GPU and tensor-parallel size, by catalogue names."""

LLAMA_FAMILY = (
    "llama-3-8b",
    "llama-3.1-8b",
    "llama-3-70b",
    "llama-3.1-70b",
    "llama-2-7b",
    "llama-2-70b",
    "codellama-34b",
)
GPUS = ("H100-SXM", "H200", "A100-80GB", "L40S")
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def llama_family(quantizations: Sequence[str] = ("bf16",)) -> list[ExpertKey]:
    """Return the experts of the Llama family that fit their GPUs; other than bf16 only where a GPU has the rate."""
    keys = [
        (model, quantization, gpu, size)
        for quantization in quantizations
        for model in LLAMA_FAMILY
        for gpu in GPUS
        for size in TENSOR_PARALLEL_SIZES
        if find_quantization(quantization).compute == find_quantization(quantization).compute_on(find_gpu(gpu))
    ]
    return [key for key in keys if why_impossible(key) is None]


def expert_key(text: str) -> ExpertKey:
    """Read MODEL/QUANTIZATION/GPU/TP, by any names of the catalogue; the model's own may hold slashes.

    Raises:
        ValueError: it has not these parts, or the expert cannot exist.
        UnknownNameError: the catalogue lacks one of them.
    """
    parts = text.rsplit("/", 3)
    if len(parts) != 4 or not parts[3].isdecimal() or int(parts[3]) < 1:
        raise ValueError(
            f"expert {text!r}: expected MODEL/QUANTIZATION/GPU/TP such as llama-3.1-8b/bf16/H100-SXM/1, TP the number "
            "of its GPUs"
        )
    key = find_model(parts[0]).name, find_quantization(parts[1]).name, find_gpu(parts[2]).name, int(parts[3])
    reason = why_impossible(key)
    if reason is not None:
        raise ValueError(f"expert {text!r}: {reason}")
    return key


def why_impossible(key: ExpertKey) -> str | None:
    """Return why an expert cannot exist, None if it can: with room for a request of the default length."""
    model, quantization, gpu, size = find_model(key[0]), find_quantization(key[1]), find_gpu(key[2]), key[3]
    if not quantization.supported_on(gpu):
        return f"{quantization.name} does not run on {gpu.name}"
    if not model.allows_tensor_parallel(size):
        return f"{model.name} cannot be split over {size} GPUs"
    if kv_tokens(key) < min(DEFAULT_MAX_MODEL_LEN, model.max_model_len):
        return f"{model.name} in {quantization.name} does not fit into {gpu.name} x{size}"
    return None


def kv_tokens(key: ExpertKey) -> int:
    """Return how many tokens of KV an expert has room for, with vLLM's defaults."""
    model, quantization, gpu, size = key
    tokens, seqs = engine_defaults(find_gpu(gpu))
    budget = memory_budget(
        find_model(model),
        find_quantization(quantization),
        find_gpu(gpu),
        tensor_parallel_size=size,
        engine=EngineSpec(),
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
    )
    return budget.num_kv_blocks * block_size_of(EngineSpec(), find_gpu(gpu))


def key_of(run: MeasuredRun) -> ExpertKey:
    """Return the expert that a run measured.

    Raises:
        CannotPredictError: the catalogue lacks its model, quantization or GPU.
    """
    model, quantization, gpu = shape_of(run)
    return model.name, quantization.name, gpu.name, run.tp
