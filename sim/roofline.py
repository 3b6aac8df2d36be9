"""The service curve derived from a model's shape and a GPU's datasheet, with measured kernel efficiencies.

One iteration is, layer by layer: four matrix products, attention, element-wise kernels and, tensor parallel, two
all-reduces; then the LM head and sampling of one row per scheduled sequence; then what the host adds. Efficiency
factors are in ``sim/data/roofline.json``.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from sim.catalogue import BF16_BYTES, Gpu, ModelShape, Quantization, SamplingFilter
from sim.cuda_graphs import capture_sizes, padded_tokens
from sim.factors import Factors, OverheadFactors, packaged_factors
from sim.fleet import FrontEnd
from sim.memory import kv_bytes_per_token
from sim.service_curve import CurveSource, DecodePiece, IterationWork

_FP32_BYTES = 4
_ALL_REDUCES_PER_LAYER = 2  # after attention and after the MLP (Megatron, arXiv 1909.08053, section 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """What measured engines say of the roofline's terms: factors on their time, 1 where nothing is known better.

    Attributes:
        matrix: of all matrix products, the LM head's included.
        kv_read: of reading KV, by decodes and prefill chunks.
        prefill_attention: of the work per query-key pair of prefill chunks.
        all_reduce: of the all-reduces.
        small_kernels: of everything else the GPU does, sampling filters apart.
    """

    matrix: float = 1.0
    kv_read: float = 1.0
    prefill_attention: float = 1.0
    all_reduce: float = 1.0
    small_kernels: float = 1.0


class Roofline:
    """Service curve of an engine by its shape; fulfils ``sim.service_curve.ServiceCurve``.

    Not modelled: the host's work between the graph pieces of a small mixed batch (hidden behind the GPU for models of
    7B and more).
    """

    def __init__(
        self,
        model: ModelShape,
        quantization: Quantization,
        gpu: Gpu,
        *,
        tensor_parallel_size: int = 1,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enforce_eager: bool = False,
        async_scheduling: bool = True,
        sampling_filter: SamplingFilter | None = None,
        factors: Factors | None = None,
        overhead: OverheadFactors | None = None,
        corrections: Corrections | None = None,
        source: CurveSource | None = None,
    ) -> None:
        """Build the curve of one engine.

        Args:
            model: its shape.
            quantization: of its weights.
            gpu: each of its GPUs.
            tensor_parallel_size: how many.
            kv_cache_dtype: as vLLM's setting.
            max_num_seqs: decides on CUDA graphs, likewise ``max_num_batched_tokens`` and ``enforce_eager``.
            max_num_batched_tokens: see there.
            enforce_eager: see there.
            async_scheduling: whose overhead it takes.
            sampling_filter: applied to every next token.
            factors: kernel efficiencies; None: the packaged ones.
            overhead: None: that of ``factors``.
            corrections: of a calibration; None: the plain roofline.
            source: what a calibration says of itself; None: "roofline, not calibrated".
        """
        factors = packaged_factors() if factors is None else factors
        self._model = model
        self._quantization = quantization
        self._gpu = gpu
        self._tensor_parallel_size = tensor_parallel_size
        self._compute = quantization.compute_on(gpu)
        self._gemm = factors.gemm(gpu, self._compute)
        self._head_gemm = factors.gemm(gpu, "bf16")
        self._elementwise = factors.elementwise(gpu)
        self._attention = factors.attention(gpu, fp8_kv=kv_cache_dtype == "fp8")
        self._all_reduce = factors.all_reduce(gpu, tensor_parallel_size)
        self._sampling = factors.sampling
        self._overhead = factors.overhead(async_scheduling=async_scheduling) if overhead is None else overhead
        self._corrections = Corrections() if corrections is None else corrections
        self._sampling_filter = sampling_filter
        self._graph_sizes = (
            ()
            if enforce_eager
            else capture_sizes(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, gpu=gpu)
        )
        host = factors.host
        launch_per_layer_s = host.eager_launch_per_layer_s if enforce_eager else host.launch_per_layer_s
        self._launch_s = launch_per_layer_s * model.layers
        kv_bytes = kv_bytes_per_token(model, tensor_parallel_size=tensor_parallel_size, kv_cache_dtype=kv_cache_dtype)
        kv_read = self._corrections.kv_read
        self._per_kv_token_s = kv_read * kv_bytes / (gpu.bandwidth_bytes_per_s * self._attention.bandwidth_efficiency)
        # a query-key pair is a multiply-add per head dimension for the score and one for the weighted sum
        pair_operations = 4 * model.layers * model.query_size / tensor_parallel_size
        pairs_per_s = gpu.bf16_per_s * self._attention.rate_efficiency / pair_operations
        self._per_pair_s = self._corrections.prefill_attention / pairs_per_s
        # by batch: filled as batches occur, so that an iteration costs two look-ups and a sum
        self._tokens_s: dict[int, float] = {}
        self._rows_s: dict[int, float] = {}
        self._pieces: dict[int, tuple[DecodePiece, DecodePiece]] = {}
        scheduling = "asynchronous" if async_scheduling else "synchronous"
        self._source = source or CurveSource(
            label="roofline, not calibrated", detail=f"{self._detail()}; {scheduling} scheduling"
        )

    @property
    def source(self) -> CurveSource:
        """Provenance; a roofline has no fitted range."""
        return self._source

    def iteration_s(self, work: IterationWork) -> float:
        """Seconds from the start of this iteration to the start of the next when the engine stays busy."""
        prefill_tokens, prefill_chunks, pairs, prefill_kv_tokens, decodes, decode_kv_tokens = work
        tokens = prefill_tokens + decodes
        rows = prefill_chunks + decodes
        gpu_s = (
            self._tokens_at(tokens)
            + self._rows_at(rows)
            + self._per_pair_s * pairs
            + self._per_kv_token_s * (prefill_kv_tokens + decode_kv_tokens)
        )
        return max(gpu_s, self._launch_floor_s(tokens)) + self._host_s(rows)

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        """Affine piece of a decode-only batch: two pieces where launches may outlast the GPU, else one."""
        pieces = self._pieces.get(decodes)
        if pieces is None:
            pieces = self._pieces[decodes] = self._pieces_of(decodes)
        launch_bound, gpu_bound = pieces
        return launch_bound if decode_kv_tokens < launch_bound.until_kv_tokens else gpu_bound

    def _pieces_of(self, decodes: int) -> tuple[DecodePiece, DecodePiece]:
        fixed_s = self._tokens_at(decodes) + self._rows_at(decodes)
        floor_s = self._launch_floor_s(decodes)
        host_s = self._host_s(decodes)
        launch_bound_until = (floor_s - fixed_s) / self._per_kv_token_s if self._per_kv_token_s else -inf
        return (
            DecodePiece(floor_s + host_s, 0.0, launch_bound_until),
            DecodePiece(fixed_s + host_s, self._per_kv_token_s, inf),
        )

    def _launch_floor_s(self, tokens: int) -> float:
        """Seconds the host needs to launch a batch that runs without a CUDA graph; 0 with one."""
        return 0.0 if self._graph_sizes and tokens <= self._graph_sizes[-1] else self._launch_s

    def _host_s(self, rows: int) -> float:
        return self._overhead.per_iteration_s + self._overhead.per_sequence_s * rows

    def _tokens_at(self, tokens: int) -> float:
        """Seconds of everything that depends on the batch's token count alone, padded to the captured size."""
        seconds = self._tokens_s.get(tokens)
        if seconds is None:
            padded = padded_tokens(tokens, self._graph_sizes)
            seconds = self._model.layers * self._layer_s(tokens if padded is None else padded)
            self._tokens_s[tokens] = seconds
        return seconds

    def _rows_at(self, rows: int) -> float:
        """Seconds of the LM head, sampling and per-sequence attention work for this many scheduled sequences."""
        seconds = self._rows_s.get(rows)
        if seconds is None:
            model = self._model
            logit_bytes = rows * model.vocab_size * _FP32_BYTES
            sampling_s = self._sampling.fixed_s + self._sampling.passes * logit_bytes / self._gpu.bandwidth_bytes_per_s
            attention_s = model.layers * self._attention.per_sequence_s * rows
            small_s = self._corrections.small_kernels * (sampling_s + attention_s)
            seconds = self._head_s(rows) + small_s + self._filter_s(logit_bytes)
            self._rows_s[rows] = seconds
        return seconds

    def _filter_s(self, logit_bytes: float) -> float:
        """Seconds of cutting the distribution of the next token to its top p or top k, which sorts every row."""
        overhead = self._overhead
        if self._sampling_filter is None:
            return 0.0
        passes = overhead.top_p_passes if self._sampling_filter == "top_p" else overhead.top_k_passes
        return overhead.filter_fixed_s + passes * logit_bytes / self._gpu.bandwidth_bytes_per_s

    def _layer_s(self, tokens: int) -> float:
        """Seconds of one layer for this many tokens; of attention all but reading KV and the work per pair."""
        model, tp = self._model, self._tensor_parallel_size
        qkv_out = model.query_size / tp + 2 * model.kv_heads_per_gpu(tp) * model.head_dim
        intermediate = model.intermediate_size / tp
        mixture = model.experts_total > 1
        seconds = (
            self._gemm_s(tokens, model.hidden_size, qkv_out)
            + self._gemm_s(tokens, model.query_size / tp, model.hidden_size)
            + self._gemm_s(tokens, model.hidden_size, 2 * intermediate, experts=mixture)
            + self._gemm_s(tokens, intermediate, model.hidden_size, experts=mixture)
        )
        # two fused residual-and-norm kernels (read and write two), rotary embedding in place, gate times up
        values = 8 * model.hidden_size + 2 * qkv_out + 3 * intermediate * model.experts_active
        elementwise_bytes_per_s = self._gpu.bandwidth_bytes_per_s * self._elementwise.bandwidth_efficiency
        small_s = self._elementwise.fixed_s + tokens * values * BF16_BYTES / elementwise_bytes_per_s
        query_bytes = 2 * tokens * model.query_size / tp * BF16_BYTES
        query_bytes_per_s = self._gpu.bandwidth_bytes_per_s * self._attention.query_bandwidth_efficiency
        small_s += self._attention.fixed_s + query_bytes / query_bytes_per_s
        seconds += self._corrections.small_kernels * small_s
        if tp > 1:
            seconds += _ALL_REDUCES_PER_LAYER * self._all_reduce_s(tokens * model.hidden_size * BF16_BYTES)
        return seconds

    def _experts_read(self, tokens: int) -> float:
        """Mean number of experts that a batch visits when each token picks its experts independently and evenly."""
        total, active = self._model.experts_total, self._model.experts_active
        return float(total * (1 - (1 - active / total) ** tokens))

    def _gemm_s(self, tokens: int, inputs: float, outputs: float, *, experts: bool = False) -> float:
        """Seconds of one matrix product of the blocks, or of all the experts that the batch visits."""
        model = self._model
        visits = tokens * (model.experts_active if experts else 1)
        read = self._experts_read(tokens) if experts else 1.0
        input_bytes = BF16_BYTES if self._compute == "bf16" else 1
        moved_bytes = inputs * outputs * self._quantization.weight_bytes * read
        moved_bytes += visits * (inputs * input_bytes + outputs * BF16_BYTES)
        rate_per_s = self._gpu.rate_per_s(self._compute) or self._gpu.bf16_per_s
        return self._corrections.matrix * self._gemm.gemm_s(
            moved_bytes / self._gpu.bandwidth_bytes_per_s, 2 * visits * inputs * outputs / rate_per_s
        )

    def _head_s(self, rows: int) -> float:
        """Seconds of the LM head, which no quantization touches."""
        inputs, outputs = self._model.hidden_size, self._model.vocab_size / self._tensor_parallel_size
        moved_bytes = (inputs * outputs + rows * (inputs + outputs)) * BF16_BYTES
        return self._corrections.matrix * self._head_gemm.gemm_s(
            moved_bytes / self._gpu.bandwidth_bytes_per_s, 2 * rows * inputs * outputs / self._gpu.bf16_per_s
        )

    def _all_reduce_s(self, message_bytes: float) -> float:
        """Seconds of one all-reduce; a ring moves ``2 (n - 1) / n`` of the message over each link."""
        size = self._tensor_parallel_size
        moved_bytes = 2 * (size - 1) / size * message_bytes
        return self._corrections.all_reduce * self._all_reduce.all_reduce_s(
            moved_bytes / self._gpu.link_bandwidth_bytes_per_s
        )

    def _detail(self) -> str:
        architecture = Factors.architecture(self._gpu).capitalize()
        text = (
            f"derived from the shape of {self._model.name} ({self._quantization.name}) and the datasheet of "
            f"{self._gpu.name} x{self._tensor_parallel_size}, with kernel efficiencies measured on {architecture} GPUs"
        )
        if not Factors.is_measured(self._gpu):
            text += f", assumed to hold for {self._gpu.name}"
        if self._quantization.weight_bits < 8:
            text += "; 4-bit weights are assumed to stream at the bandwidth efficiency of bf16 weights"
        return text


def default_front_end() -> FrontEnd:
    """Return the CPU cost of the API server process that the roofline assumes, measured at light load."""
    return packaged_factors().front_end
