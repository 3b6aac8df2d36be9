"""Runs of a table that contradict others of it, whatever the model: more time for less work on the same engine.

The time of an iteration never falls when its work grows. A saturated run whose median gap between tokens is longer than
that of another run of the same engine, although the other has at least as many requests in flight and reads at least as
much KV, holds time that its work does not explain. (Of the two it is the slower one that is doubtful: nothing makes an
engine faster than its work allows.) With it all runs of its series are doubted, those of the same engine and workload,
which are taken to have shared machine and client.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from calibrate.predictor import CannotPredictError
from calibrate.tables.lengths import saturated_lengths
from calibrate.tables.measured_runs import MeasuredRun
from calibrate.tables.run_engine import shape_of

MARGIN = 1.25
"""How much longer a gap must be to count, so that neither noise nor the assumed lengths decide."""

RULE = (
    "A series of runs (one model, GPU, tensor-parallel size, precision and workload) is doubted when the median gap of "
    f"one of them is more than {MARGIN:g} times that of another run of the same engine with at least as many requests "
    "in flight and at least as much KV to read: it holds time that its work does not explain."
)

Engine = tuple[str, str, int, str, str]
"""Model, GPU, tensor-parallel size, quantization and engine version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """A run that is slower than one with more work.

    Attributes:
        slower, faster: names of the runs.
        ratio: of their median gaps.
    """

    slower: str
    faster: str
    ratio: float


def contradictions(runs: Iterable[MeasuredRun]) -> list[Contradiction]:
    """Return each run that contradicts another, with the one that contradicts it most; flagged runs tell nothing."""
    points: dict[Engine, list[tuple[MeasuredRun, float]]] = {}
    for run in runs:
        if run.load_type != "saturated_closed_loop" or run.flag:
            continue
        if not (isfinite(run.itl_p50_s) and isfinite(run.concurrency_mean) and isfinite(run.output_tokens_mean)):
            continue
        points.setdefault(_engine(run), []).append((run, run.concurrency_mean * _context_tokens(run)))
    found = []
    for of_engine in points.values():
        for run, kv_tokens in of_engine:
            larger = [
                other
                for other, other_kv in of_engine
                if other.concurrency_mean >= run.concurrency_mean and other_kv >= kv_tokens
            ]
            fastest = min(larger, key=lambda other: other.itl_p50_s)
            ratio = run.itl_p50_s / fastest.itl_p50_s
            if ratio > MARGIN:
                found.append(Contradiction(slower=run.run_id, faster=fastest.run_id, ratio=ratio))
    return found


def doubtful_runs(runs: Iterable[MeasuredRun]) -> list[str]:
    """Return the unflagged runs of every series that has a contradicting one, in the order of the table."""
    table = list(runs)
    slower = {each.slower for each in contradictions(table)}
    series = {(_engine(run), run.workload) for run in table if run.run_id in slower}
    return [run.run_id for run in table if not run.flag and (_engine(run), run.workload) in series]


def _engine(run: MeasuredRun) -> Engine:
    return run.model, run.gpu, run.tp, run.quantization, run.engine_version


def _context_tokens(run: MeasuredRun) -> float:
    try:
        longest = run.max_model_len or shape_of(run)[0].max_model_len
    except CannotPredictError:
        longest = 131_072  # of a model that the catalogue lacks
    return saturated_lengths(run, longest).context_in_flight_tokens()
