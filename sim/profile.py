"""Calibrated service curves as files: a versioned JSON profile, and the curve it describes."""

import bisect
from collections.abc import Sequence
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sim.factors import packaged_factors
from sim.service_curve import CurveSource, DecodePiece, IterationWork
from sim.spec import EngineSpec
from sim.spec_base import PositiveInt, Seconds, Spec

ASSUMED_ERROR_GROWTH = 1.0
"""Of a profile that does not say: about what fits to small batches of measured engines show on larger ones."""


class ProfileError(ValueError):
    """A profile file that cannot be read; the message has one line per mistake, with file and field."""


class ExpertIdentity(Spec):
    """What was measured; a profile holds for this and nothing else."""

    model: str
    quantization: str
    gpu: str
    tensor_parallel_size: PositiveInt
    engine: EngineSpec
    engine_version: Annotated[str, Field(min_length=1, description="e.g. 'vLLM 0.26.0'")]


class Parameter(Spec):
    """A value and its 90 % interval, or, where it was not measured, ``assumed``: where it is from."""

    value: Seconds
    low: Seconds | None = None
    high: Seconds | None = None
    assumed: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low is None or self.high is None:
            if self.low is not None or self.high is not None or self.assumed is None:
                raise ValueError("either low and high are needed, or assumed with where the value is from")
        elif self.assumed is not None:
            raise ValueError("a value is measured, with low and high, or assumed, not both")
        elif not self.low <= self.value <= self.high:
            raise ValueError(f"low <= value <= high must hold, got {self.low:g}, {self.value:g}, {self.high:g}")
        return self


class MatrixKnot(Spec):
    """Matrix work of a batch of so many tokens, beyond that of a single one."""

    tokens: PositiveInt
    seconds: Parameter


class HostParameters(Spec):
    """What the host of an asynchronous engine takes to decide and launch one batch, in seconds, none negative.

    The device computes the batch before meanwhile, so a batch takes the longer of its host's and its device's time.
    """

    per_iteration: Annotated[Parameter, Field(description="constant: scheduler, outputs, launching a whole graph")]
    per_request: Annotated[Parameter, Field(description="per request of the batch")]
    in_pieces: Annotated[Parameter, Field(description="more for a batch with prefill, which no whole graph covers")]
    without_graph: Annotated[Parameter, Field(description="more beyond the largest captured size, kernel by kernel")]
    per_prefill_chunk: Annotated[Parameter, Field(description="per request that prefills")]


class TermParameters(Spec):
    """Terms of one iteration, each in seconds and none negative, so that time grows with every part of the work.

    Where matrix work is not proportional to tokens (on a CPU it changes its method with the size of a small batch),
    ``matrix_knots`` give it at a few sizes; it is linear between them and grows by ``per_token`` after the last.
    """

    kind: Literal["terms"] = "terms"
    per_iteration: Annotated[Parameter, Field(description="constant: host and launches")]
    weights: Annotated[Parameter, Field(description="floor of the matrix work: reading the weights once")]
    per_token: Annotated[Parameter, Field(description="matrix work per token, prefill and padded decode alike")]
    per_attention_pair: Annotated[Parameter, Field(description="attention work per query-key pair of a prefill chunk")]
    per_prefill_chunk: Annotated[Parameter, Field(description="per request that prefills")]
    per_decode: Annotated[Parameter, Field(description="per request that decodes: sampling, bookkeeping")]
    per_kv_token: Annotated[Parameter, Field(description="reading one token's KV")]
    matrix_knots: list[MatrixKnot] = Field(
        default=[], description="matrix work of small batches, ascending; empty: per_token times the tokens"
    )
    host: HostParameters | None = Field(
        None, description="below which no iteration of an asynchronous engine stays; null: the terms hold all"
    )

    @model_validator(mode="after")
    def _monotone(self) -> Self:
        for before, after in pairwise(self.matrix_knots):
            if after.tokens <= before.tokens or after.seconds.value < before.seconds.value:
                raise ValueError(
                    f"matrix_knots must ascend in tokens and never fall in seconds, got {before.tokens} tokens in "
                    f"{before.seconds.value:g} s before {after.tokens} in {after.seconds.value:g} s"
                )
        return self


class RooflineParameters(Spec):
    """Corrections of the roofline's terms (1: as derived) and what the engine adds.

    They are the fields of ``sim.roofline.Corrections`` and ``sim.factors.OverheadFactors``.
    """

    kind: Literal["roofline"] = "roofline"
    matrix: Parameter
    kv_read: Parameter
    prefill_attention: Parameter
    all_reduce: Parameter
    small_kernels: Parameter
    per_iteration_s: Parameter
    per_sequence_s: Parameter
    filter_fixed_s: Parameter
    top_p_passes: Parameter
    top_k_passes: Parameter


class Residuals(Spec):
    """How far predictions were from measurements: errors are (predicted - measured) / measured.

    Of iterations the fit was made from, or of load stages that the fit had not seen (``held_out``).
    """

    measurements: PositiveInt
    what: Literal["iterations", "load stages", "static batches"]
    held_out: bool
    engine_version: str = Field(default="", description="of the measurements; empty: the expert's own")
    gpus: list[str] = Field(default=[], description="measured on; empty: the expert's own")
    mean_error: Annotated[float, Field(allow_inf_nan=False)]
    median_absolute_error: Annotated[float, Field(ge=0)]
    p90_absolute_error: Annotated[float, Field(ge=0)]


class FittedRange(Spec):
    """Largest work per iteration among the measurements; beyond it a prediction is an extrapolation.

    Its error there is taken as ``p90_absolute_error * (1 + error_growth_per_doubling * d)``, ``d`` the doublings from
    the range to the work, the most of the three.
    """

    max_decodes: PositiveInt
    max_decode_kv_tokens: PositiveInt
    max_prefill_tokens: Annotated[int, Field(ge=0)]
    error_growth_per_doubling: Annotated[float, Field(ge=0, allow_inf_nan=False)] = ASSUMED_ERROR_GROWTH


class FrontEndCosts(Spec):
    """What a request and its tokens cost in the front end; see ``sim.fleet.FrontEnd``."""

    delay_s: Parameter
    per_request_s: Parameter
    per_prompt_token_s: Parameter
    per_output_token_s: Parameter
    per_request_engine_s: Parameter | None = Field(None, description="none: the engine has cores of its own")


class Profile(Spec):
    """A calibrated service curve with what it is worth."""

    format_version: Literal[2] = 2
    name: Annotated[str, Field(min_length=1)]
    expert: ExpertIdentity
    parameters: Annotated[TermParameters | RooflineParameters, Field(discriminator="kind")]
    residuals: Residuals
    range: FittedRange
    cuda_graph_sizes: list[PositiveInt] = Field(
        default=[], description="captured batch sizes, ascending; empty when the engine ran without graphs"
    )
    kernels: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default={}, description="of roofline parameters: efficiencies of sim/data/roofline.json that others replace"
    )
    front_end: FrontEndCosts | None = None
    num_gpu_blocks: Annotated[int, Field(ge=2)] | None = Field(
        None, description="KV blocks as the engine resolved them, its null block included"
    )
    assumptions: dict[str, str] = Field(
        default={}, description="what is not a parameter and has no interval: where it is from, and what checks it"
    )
    provenance: Annotated[str, Field(min_length=1, description="data and command that made the file")]
    licence: Annotated[str, Field(min_length=1, description="terms of the measurements")]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if sorted(set(self.cuda_graph_sizes)) != self.cuda_graph_sizes:
            raise ValueError(f"cuda_graph_sizes must ascend without repeats, got {self.cuda_graph_sizes}")
        return self

    @model_validator(mode="after")
    def _known_kernels(self) -> Self:
        unknown = sorted(set(self.kernels) - set(packaged_factors().values()))
        if unknown:
            raise ValueError(f"kernels: sim/data/roofline.json has no {unknown[0]!r}")
        return self


def source_of(profile: Profile) -> CurveSource:
    """Return what a profile says of itself: name, worth and range."""
    worth = profile.residuals
    how = "predicted without having seen" if worth.held_out else "fitted on"
    return CurveSource(
        label=profile.name,
        detail=(
            f"{how} {worth.measurements} {worth.what} of {worth.engine_version or profile.expert.engine_version} on "
            f"{', '.join(worth.gpus) or profile.expert.gpu}, "
            f"median error {worth.median_absolute_error:.1%}, 90 % within {worth.p90_absolute_error:.1%}; "
            f"{profile.provenance}"
        ),
        max_decodes=profile.range.max_decodes,
        max_decode_kv_tokens=profile.range.max_decode_kv_tokens,
        max_prefill_tokens=profile.range.max_prefill_tokens,
        error_p90=worth.p90_absolute_error,
        error_growth_per_doubling=profile.range.error_growth_per_doubling,
    )


def matrix_work_s(tokens: float, knots: Sequence[tuple[float, float]], per_token_s: float) -> float:
    """Return the matrix work of a batch: on the lines between (tokens, seconds) knots, from 0 at one token on."""
    if not knots:
        return per_token_s * tokens
    before_tokens, before_s = 1.0, 0.0
    for knot_tokens, knot_s in knots:
        if tokens <= knot_tokens:
            share = (tokens - before_tokens) / (knot_tokens - before_tokens) if knot_tokens > before_tokens else 1.0
            return before_s + max(0.0, share) * (knot_s - before_s)
        before_tokens, before_s = knot_tokens, knot_s
    return before_s + per_token_s * (tokens - before_tokens)


class ProfileCurve:
    """Service curve of a profile of terms; fulfils ``sim.service_curve.ServiceCurve``.

    One iteration takes ``per_iteration + max(weights, per_token * tokens) + per_attention_pair * pairs
    + per_prefill_chunk * chunks + per_decode * decodes + per_kv_token * KV tokens``, where ``tokens`` is prefill and
    decode tokens together, rounded up to the next captured size if there is one. With knots the matrix work runs
    through them instead of ``per_token * tokens``. With a host part that is the device's time, and an iteration takes
    no less than the host's: ``per_iteration + per_request * requests + per_prefill_chunk * chunks``, with ``in_pieces``
    unless one graph covers it, and ``without_graph`` beyond the largest captured size.
    """

    def __init__(self, profile: Profile) -> None:
        """Take the terms of a profile.

        Raises:
            TypeError: its parameters are not terms.
        """
        terms = profile.parameters
        if not isinstance(terms, TermParameters):
            raise TypeError(f"profile {profile.name} has parameters of kind {terms.kind}, expected terms")
        self._sizes = profile.cuda_graph_sizes
        self._per_iteration_s = terms.per_iteration.value
        self._weights_s = terms.weights.value
        self._per_token_s = terms.per_token.value
        self._knots = [(knot.tokens, knot.seconds.value) for knot in terms.matrix_knots]
        self._per_pair_s = terms.per_attention_pair.value
        self._per_chunk_s = terms.per_prefill_chunk.value
        self._per_decode_s = terms.per_decode.value
        self._per_kv_token_s = terms.per_kv_token.value
        host = terms.host
        self._host: dict[str, float] | None = None if host is None else {name: each.value for name, each in host}
        self._largest_graph = max(self._sizes, default=0)
        self._matrix_s_by_tokens: dict[int, float] = {}
        self._pieces: dict[int, tuple[DecodePiece, DecodePiece]] = {}
        self._source = source_of(profile)

    @property
    def source(self) -> CurveSource:
        """The profile's name, worth and range."""
        return self._source

    def iteration_s(self, work: IterationWork) -> float:
        """Seconds from the start of this iteration to the start of the next when the engine stays busy."""
        prefill_tokens, prefill_chunks, pairs, prefill_kv_tokens, decodes, decode_kv_tokens = work
        device_s = (
            self._per_iteration_s
            + self._matrix_s(prefill_tokens + decodes)
            + self._per_pair_s * pairs
            + self._per_chunk_s * prefill_chunks
            + self._per_decode_s * decodes
            + self._per_kv_token_s * (prefill_kv_tokens + decode_kv_tokens)
        )
        return max(device_s, self._host_s(prefill_tokens, prefill_chunks, decodes))

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        """The affine piece of a decode-only batch: the host's as long as it takes longer, then the device's."""
        pieces = self._pieces.get(decodes)
        if pieces is None:
            fixed_s = self._per_iteration_s + self._matrix_s(decodes) + self._per_decode_s * decodes
            host_s = self._host_s(0, 0, decodes)
            if self._per_kv_token_s:
                until = (host_s - fixed_s) / self._per_kv_token_s
            else:
                until = inf if host_s > fixed_s else -inf
            pieces = DecodePiece(host_s, 0.0, until), DecodePiece(fixed_s, self._per_kv_token_s, inf)
            self._pieces[decodes] = pieces
        of_host, of_device = pieces
        return of_host if decode_kv_tokens < of_host.until_kv_tokens else of_device

    def _host_s(self, prefill_tokens: int, prefill_chunks: int, decodes: int) -> float:
        """Seconds of the host's work on a batch; 0 where the terms hold it already."""
        host = self._host
        if host is None:
            return 0.0
        seconds = host["per_iteration"] + host["per_request"] * (decodes + prefill_chunks)
        beyond = prefill_tokens + decodes > self._largest_graph
        if prefill_chunks or beyond:
            seconds += host["in_pieces"] + host["per_prefill_chunk"] * prefill_chunks
        return seconds + host["without_graph"] if beyond else seconds

    def _matrix_s(self, tokens: int) -> float:
        """Seconds of the matrix work, never below reading the weights."""
        seconds = self._matrix_s_by_tokens.get(tokens)
        if seconds is None:
            place = bisect.bisect_left(self._sizes, tokens)
            padded = self._sizes[place] if place < len(self._sizes) else tokens
            seconds = max(self._weights_s, matrix_work_s(padded, self._knots, self._per_token_s))
            self._matrix_s_by_tokens[tokens] = seconds
        return seconds


def load_profile(path: Path) -> Profile:
    """Read a profile file.

    Raises:
        ProfileError: the file cannot be read, is no JSON, or breaks the schema; one line per mistake.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ProfileError(f"profile {path}: cannot be read: {reason}") from error
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        lines = []
        for mistake in error.errors(include_url=False):
            field = ".".join(str(part) for part in mistake["loc"]) or "file"
            shown = "" if mistake["type"] in {"missing", "json_invalid"} else f", got {mistake['input']!r:.80}"
            lines.append(f"profile {path}: {field}: {mistake['msg']}{shown}")
        raise ProfileError("\n".join(lines)) from error
