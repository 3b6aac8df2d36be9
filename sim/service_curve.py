"""How long one engine iteration takes: the protocol every service-time model fulfils.

Nothing else in the model knows how fast a GPU is.
"""

from dataclasses import dataclass, replace
from math import log2, nan
from typing import NamedTuple, Protocol


class IterationWork(NamedTuple):
    """What one engine iteration computes.

    Attributes:
        prefill_tokens: prompt (or recomputed) tokens processed in this iteration.
        prefill_chunks: number of requests those tokens belong to.
        prefill_attention_pairs: sum over the chunks of query-key pairs. A chunk of ``q`` tokens after ``c`` computed
            tokens has ``q * c + q * (q + 1) / 2`` pairs (causal attention).
        prefill_kv_tokens: sum over the chunks of the tokens whose KV is read, ``c + q``.
        decodes: requests that decode one token.
        decode_kv_tokens: sum over those requests of the tokens whose KV is read (context, the new token included).
    """

    prefill_tokens: int
    prefill_chunks: int
    prefill_attention_pairs: float
    prefill_kv_tokens: int
    decodes: int
    decode_kv_tokens: int


class DecodePiece(NamedTuple):
    """Time of a decode-only iteration: ``fixed_s + per_kv_token_s * decode_kv_tokens``.

    Holds while ``decode_kv_tokens <= until_kv_tokens`` (``inf`` for a curve of one piece). With a fixed batch the KV
    grows by the batch size in every iteration, so a run of iterations has a closed form.
    """

    fixed_s: float
    per_kv_token_s: float
    until_kv_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSource:
    """Where a curve's figures come from, printed beside every prediction made with it.

    Attributes:
        label: short, e.g. ``"roofline, not calibrated"`` or a profile's name.
        detail: one sentence with engine version, data and error, for files and reports.
        max_decodes: largest decode batch the curve was fitted on; None when it was not fitted.
        max_decode_kv_tokens: largest KV read per iteration it was fitted on; None when it was not fitted.
        max_prefill_tokens: largest prefill chunk total it was fitted on; None when it was not fitted.
        error_p90: share of the measured time that 90 % of its predictions inside the range were within; NaN when
            nobody knows.
        error_growth_per_doubling: by how much of itself that error grows with each doubling beyond the range.
    """

    label: str
    detail: str
    max_decodes: int | None = None
    max_decode_kv_tokens: int | None = None
    max_prefill_tokens: int | None = None
    error_p90: float = nan
    error_growth_per_doubling: float = 0.0

    def doublings_beyond(self, decodes: int, decode_kv_tokens: int, prefill_tokens: int) -> float:
        """Return how many doublings beyond its range a curve has to reach for this work; 0 inside or without one."""
        reached = (
            (decodes, self.max_decodes),
            (decode_kv_tokens, self.max_decode_kv_tokens),
            (prefill_tokens, self.max_prefill_tokens),
        )
        return max((log2(seen / fitted) for seen, fitted in reached if fitted and seen > fitted), default=0.0)

    def widening(self, decodes: int, decode_kv_tokens: int, prefill_tokens: int) -> float:
        """Return the factor on ``error_p90`` for this work: 1 inside the range, larger with every doubling beyond."""
        doublings = self.doublings_beyond(decodes, decode_kv_tokens, prefill_tokens)
        return 1 + self.error_growth_per_doubling * doublings


class ServiceCurve(Protocol):
    """Seconds of one engine iteration; monotone in every field of the work."""

    @property
    def source(self) -> CurveSource:
        """Provenance and fitted range."""
        ...

    def iteration_s(self, work: IterationWork) -> float:
        """Seconds from the start of this iteration to the start of the next when the engine stays busy."""
        ...

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        """Affine piece that gives ``iteration_s`` for a decode-only batch at this KV length."""
        ...


class ScaledCurve:
    """Another curve with every time multiplied: what an error of the curve would do to a fleet."""

    def __init__(self, curve: ServiceCurve, factor: float) -> None:
        """Scale a curve.

        Raises:
            ValueError: the factor is not positive.
        """
        if not factor > 0:
            raise ValueError(f"the factor of iteration times must be > 0, got {factor}")
        self._curve = curve
        self._factor = factor

    @property
    def source(self) -> CurveSource:
        """That of the curve, with the factor in its label."""
        source = self._curve.source
        return replace(source, label=f"{source.label} times {self._factor:.4g}")

    def iteration_s(self, work: IterationWork) -> float:
        """Seconds of the curve's iteration, scaled."""
        return self._factor * self._curve.iteration_s(work)

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        """The curve's piece, scaled."""
        fixed_s, per_kv_token_s, until_kv_tokens = self._curve.decode_piece(decodes, decode_kv_tokens)
        return DecodePiece(self._factor * fixed_s, self._factor * per_kv_token_s, until_kv_tokens)
