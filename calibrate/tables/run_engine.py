"""The engine of a measured run in the catalogue's terms: model, GPU, quantization, settings and KV blocks."""

import re
from dataclasses import dataclass

from calibrate.predictor import CannotPredictError
from calibrate.tables.measured_runs import MeasuredRun
from sim.catalogue import Gpu, ModelShape, Quantization, UnknownNameError, find_gpu, find_model, find_quantization
from sim.fleet import EngineSettings
from sim.memory import engine_defaults, memory_budget
from sim.spec import EngineSpec

ASYNC_SCHEDULING_SINCE = (0, 14)
"""vLLM decides a batch while the one before runs by default from 0.14.0 on."""
V1_SINCE = (0, 8)

_MODELS = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b",  # but for 768 more entries of the vocabulary
    "neuralmagic/Meta-Llama-3.1-8B-FP8": "llama-3.1-8b",
    "neuralmagic/Meta-Llama-3.1-70B-Instruct-FP8": "llama-3.1-70b",
}
_QUANTIZATIONS = {"none": "bf16", "fp8-dynamic": "fp8", "fp8 (W8A8 on H100; weight-only Marlin on A100)": "fp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEngine:
    """What the catalogue and the memory model say of a run's engine.

    Attributes:
        async_scheduling: by the engine's version; None where the row does not say which.
        notes: what was assumed beyond the row.
    """

    model: ModelShape
    gpu: Gpu
    quantization: Quantization
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_kv_blocks: int
    enable_prefix_caching: bool
    async_scheduling: bool | None
    notes: tuple[str, ...]

    def settings(self, *, async_scheduling: bool) -> EngineSettings:
        """Return the settings as the simulation takes them."""
        return EngineSettings(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_kv_blocks=self.num_kv_blocks,
            enable_prefix_caching=self.enable_prefix_caching,
            scheduler_reserve_full_isl=True,
            async_scheduling=async_scheduling,
        )


def run_engine(run: MeasuredRun) -> RunEngine:
    """Return the engine of a run.

    Raises:
        CannotPredictError: the catalogue lacks its model, GPU or quantization, or the model does not fit.
    """
    model, quantization, gpu = shape_of(run)
    if run.dp != 1:
        raise CannotPredictError(f"data parallel over {run.dp} engines behind one front end is not simulated")
    notes = []
    tokens, seqs = engine_defaults(
        gpu, max_num_batched_tokens=run.max_num_batched_tokens, max_num_seqs=run.max_num_seqs
    )
    if run.max_num_batched_tokens is None:
        notes.append(f"max_num_batched_tokens assumed {tokens}")
    if run.max_num_seqs is None:
        notes.append(f"max_num_seqs assumed {seqs}")
    block_size = run.block_size or 16
    if run.kv_blocks is not None:
        blocks = run.kv_blocks - 1
    else:
        utilization = run.gpu_mem_util
        if utilization != utilization:
            utilization = 0.9
            notes.append("gpu_memory_utilization assumed 0.9")
        # Engines of before 0.20 set nothing aside for CUDA graphs (tests/test_memory.py), as an eager one does today.
        spec = EngineSpec(gpu_memory_utilization=utilization, block_size=block_size, enforce_eager=True)
        blocks = memory_budget(
            model,
            quantization,
            gpu,
            tensor_parallel_size=run.tp,
            engine=spec,
            max_num_batched_tokens=tokens,
            max_num_seqs=seqs,
        ).num_kv_blocks
        notes.append(f"{blocks} KV blocks from the memory model")
        if blocks < 1:
            raise CannotPredictError(f"by the memory model {model.name} does not fit {run.tp} {gpu.name}")
    if run.cpu_kv_offload:
        notes.append("KV offload to the CPU is not simulated")
    caching = run.prefix_caching
    return RunEngine(
        model=model,
        gpu=gpu,
        quantization=quantization,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=run.max_model_len or model.max_model_len,
        block_size=block_size,
        num_kv_blocks=blocks,
        enable_prefix_caching=True if caching is None else caching,
        async_scheduling=schedules_asynchronously(run.engine_version),
        notes=tuple(notes),
    )


def shape_of(run: MeasuredRun) -> tuple[ModelShape, Quantization, Gpu]:
    """Return model, quantization and GPU of a run from the catalogue.

    Raises:
        CannotPredictError: one of them is not in it.
    """
    try:
        return (
            find_model(_MODELS.get(run.model, run.model)),
            find_quantization(_QUANTIZATIONS.get(run.quantization, run.quantization)),
            gpu_of_run(run),
        )
    except UnknownNameError as error:
        raise CannotPredictError(str(error)) from None


def gpu_of_run(run: MeasuredRun) -> Gpu:
    """Return the GPU of a run, also where its name says that the source did not state it.

    Raises:
        UnknownNameError: the catalogue lacks it.
    """
    return find_gpu(run.gpu.removesuffix(" (inferred)"))


def schedules_asynchronously(engine_version: str) -> bool | None:
    """Return whether a vLLM of this version decides batches ahead by default; None for a text without a version."""
    version = _version(engine_version)
    return None if version is None else version >= ASYNC_SCHEDULING_SINCE


def is_v0(engine_version: str) -> bool:
    """Return whether a vLLM of this version runs the engine before V1, by its number or because the text says so."""
    version = _version(engine_version)
    return "V0" in engine_version if version is None else version < V1_SINCE


def _version(text: str) -> tuple[int, int] | None:
    found = re.match(r"(?:vLLM )?v?(\d+)\.(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]))
