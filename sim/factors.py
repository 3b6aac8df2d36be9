"""The roofline's efficiency factors: named numbers in ``sim/data/roofline.json``, each with a line on how it was set.

``python -m calibrate.fit.roofline_factors`` writes the file from measured operator times and runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from sim.catalogue import ComputeDtype, Gpu
from sim.fleet import FrontEnd

FORMAT_VERSION = 1

_ADA_COMPUTE_CAPABILITY = 8.9
_HOPPER_COMPUTE_CAPABILITY = 9.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmFactors:
    """One matrix product: ``fixed_s + (memory_s ** p + compute_s ** p) ** (1 / p)``, ``p`` the overlap exponent.

    Attributes:
        bandwidth_efficiency: share of the datasheet's bandwidth when memory-bound.
        rate_efficiency: share of the datasheet's dense rate when compute-bound.
    """

    fixed_s: float
    bandwidth_efficiency: float
    rate_efficiency: float
    overlap_exponent: float

    def gemm_s(self, memory_s: float, compute_s: float) -> float:
        """Return the seconds of one product from its times at the datasheet's bandwidth and rate."""
        memory_s /= self.bandwidth_efficiency
        compute_s /= self.rate_efficiency
        longer_s, shorter_s = max(memory_s, compute_s), min(memory_s, compute_s)
        power = self.overlap_exponent
        overlap = float((1 + (shorter_s / longer_s) ** power) ** (1 / power))
        return self.fixed_s + longer_s * overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFactors:
    """Attention of one layer.

    Attributes:
        fixed_s: of one call, which covers the whole batch; ``per_sequence_s`` for each request in it.
        bandwidth_efficiency: share of bandwidth at which KV is read.
        rate_efficiency: share of the dense bf16 rate at which query-key pairs of prefill chunks are computed.
        query_bandwidth_efficiency: share of bandwidth at which queries are read and outputs written.
    """

    fixed_s: float
    per_sequence_s: float
    bandwidth_efficiency: float
    rate_efficiency: float
    query_bandwidth_efficiency: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceFactors:
    """One all-reduce, by the faster of vLLM's own kernel and NCCL: a fixed time, and bytes over the link.

    Attributes:
        link_efficiency: share of the link's one-direction bandwidth that vLLM's kernel reaches.
        nccl_fixed_s: as ``fixed_s``, of NCCL; likewise ``nccl_link_efficiency``.
    """

    fixed_s: float
    link_efficiency: float
    nccl_fixed_s: float
    nccl_link_efficiency: float

    def all_reduce_s(self, link_s: float) -> float:
        """Return the seconds of one all-reduce whose bytes take ``link_s`` at the link's full bandwidth."""
        own_s = self.fixed_s + link_s / self.link_efficiency
        return min(own_s, self.nccl_fixed_s + link_s / self.nccl_link_efficiency)


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseFactors:
    """Norms, rotary embedding and activation of one layer: ``fixed_s`` and their bytes at a share of bandwidth."""

    fixed_s: float
    bandwidth_efficiency: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadFactors:
    """What one engine adds to its kernels, read off measured iterations.

    Attributes:
        per_iteration_s: host time that the GPU does not hide; likewise ``per_sequence_s``, per scheduled sequence.
        filter_fixed_s: of cutting the distribution of the next token, per iteration.
        top_p_passes: how often the cut to the top p could have moved the FP32 logits at full bandwidth in its time;
            likewise ``top_k_passes``, to the top k with or without top p.
    """

    per_iteration_s: float
    per_sequence_s: float
    filter_fixed_s: float
    top_p_passes: float
    top_k_passes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFactors:
    """CPU time to launch one layer without a CUDA graph, a floor of the iteration: compiled, or not (eager)."""

    launch_per_layer_s: float
    eager_launch_per_layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFactors:
    """Sampling: ``fixed_s``, and how often it moves the FP32 logits (``passes``)."""

    fixed_s: float
    passes: float


_Group = TypeVar(
    "_Group",
    bound=GemmFactors
    | AttentionFactors
    | AllReduceFactors
    | ElementwiseFactors
    | OverheadFactors
    | HostFactors
    | SamplingFactors
    | FrontEnd,
)


_NOT_PACKAGED = {"per_request_engine_s"}  # of engines that share their front end's cores, which GPUs' do not


class Factors:
    """All factors by name; grouped views for one GPU.

    A GPU takes the factors of its architecture: Ampere, Ada or Hopper. Blackwell and AMD have no measured kernels and
    take Hopper's, which ``is_measured`` tells.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)

    @staticmethod
    def architecture(gpu: Gpu) -> str:
        """Return ``"ampere"``, ``"ada"`` or ``"hopper"``: whose factors this GPU takes."""
        if gpu.compute_capability >= _HOPPER_COMPUTE_CAPABILITY:
            return "hopper"
        return "ada" if gpu.compute_capability >= _ADA_COMPUTE_CAPABILITY else "ampere"

    @staticmethod
    def is_measured(gpu: Gpu) -> bool:
        """Return whether the factors were measured on GPUs of this one's architecture."""
        return gpu.compute_capability <= _HOPPER_COMPUTE_CAPABILITY

    def gemm(self, gpu: Gpu, dtype: ComputeDtype) -> GemmFactors:
        """Matrix products; INT8 kernels were not measured and take FP8's factors, or bf16's on Ampere."""
        architecture = self.architecture(gpu)
        measured = "bf16" if dtype == "bf16" or architecture == "ampere" else "fp8"
        group = f"{architecture}.gemm_{measured}"
        return self._group(group, GemmFactors)

    def attention(self, gpu: Gpu, *, fp8_kv: bool) -> AttentionFactors:
        """Attention kernels; FP8 KV was not measured on Ampere and takes bf16's factors there."""
        architecture = self.architecture(gpu)
        measured = "fp8" if fp8_kv and architecture != "ampere" else "bf16"
        return self._group(f"{architecture}.attention_{measured}_kv", AttentionFactors)

    def all_reduce(self, gpu: Gpu, tensor_parallel_size: int) -> AllReduceFactors:
        """All-reduce over this many GPUs; a size not measured (2, 4, 8 were) takes the next larger, at most 8."""
        size = next((size for size in (2, 4) if tensor_parallel_size <= size), 8)
        return self._group(f"{self.link(gpu)}.all_reduce_tp{size}", AllReduceFactors)

    @staticmethod
    def link(gpu: Gpu) -> str:
        """Return whose all-reduces a GPU takes: those over PCIe, or those of its architecture over NVLink."""
        return "pcie" if gpu.linked_by_pcie else Factors.architecture(gpu)

    def elementwise(self, gpu: Gpu) -> ElementwiseFactors:
        """Element-wise kernels."""
        return self._group(f"{self.architecture(gpu)}.elementwise", ElementwiseFactors)

    def overhead(self, *, async_scheduling: bool) -> OverheadFactors:
        """What the host adds; a synchronous engine schedules and prepares while the GPU waits."""
        return self._group("host_asynchronous" if async_scheduling else "host_synchronous", OverheadFactors)

    @property
    def host(self) -> HostFactors:
        """Launches without a CUDA graph."""
        return self._group("host", HostFactors)

    @property
    def sampling(self) -> SamplingFactors:
        """Sampling kernels."""
        return self._group("sampling", SamplingFactors)

    @property
    def front_end(self) -> FrontEnd:
        """CPU seconds of the API server process."""
        return self._group("front_end", FrontEnd)

    def values(self) -> dict[str, float]:
        """Return all factors by name."""
        return dict(self._values)

    def replaced(self, values: Mapping[str, float]) -> "Factors":
        """Return these factors with some replaced."""
        return Factors({**self._values, **values})

    def without_launches(self) -> "Factors":
        """Return these factors with launches that take no time, so that iteration times are linear in corrections."""
        return self.replaced({"host.launch_per_layer_s": 0.0, "host.eager_launch_per_layer_s": 0.0})

    def _group(self, group: str, kind: type[_Group]) -> _Group:
        names = [field.name for field in fields(kind) if field.name not in _NOT_PACKAGED]
        return kind(**{name: self._values[f"{group}.{name}"] for name in names})


@cache
def packaged_factors() -> Factors:
    """Return the factors shipped with the package."""
    return Factors({name: entry["value"] for name, entry in _entries().items()})


def how_set(name: str) -> str:
    """Return how a packaged factor was set, such as ``"front_end.per_request_s"``."""
    how: str = _entries()[name]["how"]
    return how


@cache
def _entries() -> dict[str, Any]:
    text = resources.files("sim").joinpath("data", "roofline.json").read_text(encoding="utf-8")
    entries: dict[str, Any] = json.loads(text)["factors"]
    return entries
