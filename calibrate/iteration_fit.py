"""From iteration records to a profile of terms: what each part of an iteration's work costs.

An observation is a stretch of like decode-only iterations, as the mean of their cycles, or one iteration with prefill.
The time from log line to log line also has the moments at which the front end got to write them, so its noise has two
parts: a share of the time itself, and jitter that a stretch averages out. The time is linear in non-negative parameters
once the floor of the matrix work is given as a number of tokens; the floor is searched, the rest is non-negative least
squares with Huber weights (Huber 1964), so that a stall of the machine does not steer it. Intervals come from refits to
resampled points, whole points at a time, and errors from leaving each point out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from sim.cuda_graphs import padded_tokens
from sim.profile import Parameter, TermParameters
from sim.service_curve import IterationWork
from sim.streams import stream

TERMS = ("per_iteration", "per_token", "per_attention_pair", "per_prefill_chunk", "per_decode", "per_kv_token")
"""What the time is linear in; ``weights`` is ``per_token`` times the floor."""
FLOORS = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens up to which matrix work may take no less time."""
SHARE_NOISE = 0.02
"""Standard deviation of an observation, as a share of its time."""
HUBER = 1.5
LONGEST_STRETCH = 16
SHORTEST_STRETCH = 3
RESAMPLES = 200
CONFIDENCE = 0.9
FEWEST_OBSERVATIONS = 8

Floats = NDArray[np.float64]


class TooFewRecordsError(ValueError):
    """There is not enough to fit; the message says how much there is and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What a fit is made from; all arrays have one entry an observation.

    Attributes:
        works: shape (observations, 6), means of the fields of ``IterationWork``.
        measured_s: mean cycle.
        iterations: how many cycles it is the mean of.
        points: name of what was measured, repeats alike.
        jitter_s: standard deviation of one log line's delay.
    """

    works: Floats
    measured_s: Floats
    iterations: Floats
    points: NDArray[np.object_]
    jitter_s: float

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> "Observations":
        """Return some of them, by mask or index."""
        return Observations(
            works=self.works[keep],
            measured_s=self.measured_s[keep],
            iterations=self.iterations[keep],
            points=self.points[keep],
            jitter_s=self.jitter_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TermFit:
    """Parameters by name of TERMS, and the floor of the matrix work in tokens."""

    terms: dict[str, float]
    floor_tokens: int
    graph_sizes: tuple[int, ...]

    def predict_s(self, works: Floats) -> Floats:
        """Return seconds of iterations, ``works`` as in ``Observations``."""
        matrix = design(works, self.floor_tokens, self.graph_sizes)
        return np.asarray(matrix @ np.array([self.terms[name] for name in TERMS]))

    @property
    def weights_s(self) -> float:
        """The floor in seconds."""
        return self.terms["per_token"] * self.floor_tokens


def observations(records: pd.DataFrame) -> Observations:
    """Gather observations from records (``iteration_records.ITERATION_COLUMNS``) in the order of their logging.

    Records that are not matched, and cycles that an idle engine interrupted, are left out. Point names end in
    ``#NUMBER`` where one was measured several times.

    Raises:
        TooFewRecordsError: fewer than FEWEST_OBSERVATIONS are left.
    """
    rows: list[tuple[Floats, float, int, str]] = []
    overheads = []
    works = records[[*IterationWork._fields]].to_numpy(dtype=np.float64)
    cycle_s, elapsed_s = records["cycle_s"].to_numpy(), records["elapsed_s"].to_numpy()
    usable = records["matched"].to_numpy() & (cycle_s > 0)
    names = records["point"].to_numpy()
    for first, last in _stretches(names, works, usable):
        length = last - first
        if works[first, 0] == 0 and length < SHORTEST_STRETCH:
            continue
        name = str(names[first]).partition("#")[0]
        rows.append((works[first:last].mean(axis=0), float(cycle_s[first:last].mean()), length, name))
        if length > SHORTEST_STRETCH:
            overheads.append(np.std(cycle_s[first:last] - elapsed_s[first:last], ddof=1))
    if len(rows) < FEWEST_OBSERVATIONS:
        raise TooFewRecordsError(
            f"{len(records)} iteration records give {len(rows)} observations, a fit needs {FEWEST_OBSERVATIONS}; "
            "measure for longer"
        )
    return Observations(
        works=np.array([row[0] for row in rows]),
        measured_s=np.array([row[1] for row in rows]),
        iterations=np.array([float(row[2]) for row in rows]),
        points=np.array([row[3] for row in rows], dtype=np.object_),
        # A cycle ends and begins with a delayed line.
        jitter_s=float(np.median(overheads)) / 2**0.5 if overheads else 0.0,
    )


def _stretches(names: NDArray[np.object_], works: Floats, usable: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the first and one past the last record of each observation."""
    first = 0
    for place in range(len(names) + 1):
        goes_on = (
            place < len(names)
            and place > first
            and place - first < LONGEST_STRETCH
            and usable[place]
            and names[place] == names[first]
            and works[place, 0] == 0 == works[first, 0]
            and works[place, 4] == works[first, 4]
        )
        if goes_on:
            continue
        if place > first and usable[first]:
            yield first, place
        first = place


def design(works: Floats, floor_tokens: int, graph_sizes: Sequence[int] = ()) -> Floats:
    """Return what each of TERMS contributes per unit, shape (observations, terms)."""
    prefill_tokens, chunks, pairs, prefill_kv_tokens, decodes, decode_kv_tokens = works.T
    tokens = prefill_tokens + decodes
    if graph_sizes:
        sizes = tuple(graph_sizes)
        tokens = np.array([padded_tokens(int(np.ceil(each)), sizes) or each for each in tokens], dtype=float)
    matrix = np.maximum(tokens, floor_tokens)
    return np.column_stack(
        [np.ones(len(works)), matrix, pairs, chunks, decodes, prefill_kv_tokens + decode_kv_tokens]
    ).astype(np.float64)


def fit_terms(
    seen: Observations, *, graph_sizes: Sequence[int] = (), floors: Sequence[int] = FLOORS, start: TermFit | None = None
) -> TermFit:
    """Return the non-negative terms of least Huber loss of relative errors.

    Args:
        seen: at least a few.
        graph_sizes: captured batch sizes; a batch is padded to the next one.
        floors: to choose from.
        start: an earlier fit to begin from, for speed.
    """
    best: tuple[float, TermFit] | None = None
    sizes = tuple(graph_sizes)
    largest = float((seen.works[:, 0] + seen.works[:, 4]).max())
    expected_s = seen.measured_s if start is None else np.maximum(start.predict_s(seen.works), 1e-9)
    for floor in [each for each in floors if each <= largest] or [0]:
        loss, values = _solve(design(seen.works, floor, sizes), seen, expected_s, rounds=30 if start is None else 6)
        if best is None or loss < best[0] * (1 - 1e-9):
            named = {name: float(value) for name, value in zip(TERMS, values, strict=True)}
            best = loss, TermFit(terms=named, floor_tokens=floor, graph_sizes=sizes)
    assert best is not None
    return best[1]


def noise_s(seen: Observations, expected_s: Floats) -> Floats:
    """Return the standard deviation of each observation when its time is ``expected_s``."""
    jitter_s = seen.jitter_s * 2**0.5 / seen.iterations
    return np.asarray(np.hypot(SHARE_NOISE * expected_s, jitter_s))


def _solve(matrix: Floats, seen: Observations, expected_s: Floats, *, rounds: int) -> tuple[float, Floats]:
    """Return the Huber loss and the parameters."""
    scale = np.maximum(np.abs(matrix / seen.measured_s[:, None]).max(axis=0), 1e-300)
    deviation_s = noise_s(seen, expected_s)
    weight = np.ones(len(expected_s))
    values = np.zeros(matrix.shape[1])
    for _ in range(rounds):
        rows = weight / deviation_s
        new, _ = nnls(matrix * rows[:, None] / scale, seen.measured_s * rows)
        new = new / scale
        settled = np.allclose(new, values, rtol=1e-6, atol=0)
        values = new
        errors = np.abs(matrix @ values - seen.measured_s) / deviation_s
        typical = max(1.0, float(np.median(errors)) / 0.6745)  # a noisier machine than assumed is no outlier
        weight = np.sqrt(HUBER * typical / np.maximum(errors, HUBER * typical))
        if settled:
            break
    knee = HUBER * typical
    loss = np.where(errors <= knee, errors**2 / 2, knee * (errors - knee / 2)).sum()
    return float(loss), values


def term_parameters(
    seen: Observations, *, graph_sizes: Sequence[int] = (), resamples: int = RESAMPLES
) -> tuple[TermFit, TermParameters]:
    """Return the fit, and its parameters with 90 % intervals from refits to resampled points."""
    fitted = fit_terms(seen, graph_sizes=graph_sizes)
    names = np.unique(seen.points.astype(str))
    rows_of = [np.flatnonzero(seen.points == name) for name in names]
    near = [floor for floor in FLOORS if fitted.floor_tokens / 4 <= floor <= 4 * max(fitted.floor_tokens, 4)]
    refits = [fitted]
    for number in range(resamples):
        drawn = stream(0, "points", number).integers(len(names), size=len(names))
        rows = np.concatenate([rows_of[index] for index in drawn])
        refits.append(fit_terms(seen.select(rows), graph_sizes=graph_sizes, floors=near, start=fitted))

    def parameter(name: str) -> Parameter:
        values = [each.weights_s if name == "weights" else each.terms[name] for each in refits]
        low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        value = _digits(values[0])
        return Parameter(value=value, low=min(_digits(low), value), high=max(_digits(high), value))

    return fitted, TermParameters(**{name: parameter(name) for name in ("weights", *TERMS)})


def held_out_errors(seen: Observations, *, graph_sizes: Sequence[int] = ()) -> Floats:
    """Return relative errors on points that the fit had not seen: of each point's decode and prefill iterations.

    One error for all decode-only iterations of a point together and one for those with prefill, since what is wanted
    is their time and not the jitter of single log lines.
    """
    fitted = fit_terms(seen, graph_sizes=graph_sizes)
    errors = []
    for name in np.unique(seen.points.astype(str)):
        mine = seen.points == name
        if mine.all():
            continue
        others = fit_terms(seen.select(~mine), graph_sizes=graph_sizes, start=fitted)
        told = seen.select(mine)
        errors += part_errors(told, others.predict_s(told.works))
    return np.array(errors)


def part_errors(seen: Observations, predicted_s: Floats) -> list[float]:
    """Return (predicted - measured) / measured of the decode-only iterations together, and of those with prefill."""
    errors = []
    for part in (seen.works[:, 0] == 0, seen.works[:, 0] > 0):
        weight = seen.iterations[part]
        if part.any():
            errors.append(float(predicted_s[part] @ weight / (seen.measured_s[part] @ weight) - 1))
    return errors


def mean_error(seen: Observations, fitted: TermFit) -> float:
    """Return the relative error of all iterations' time together; NaN without any."""
    measured_s = float(seen.measured_s @ seen.iterations)
    return float(fitted.predict_s(seen.works) @ seen.iterations) / measured_s - 1 if measured_s else nan


def _digits(value: float) -> float:
    """Four significant digits, so that a file does not change with the last bits of a solver."""
    return float(f"{float(value):.4g}")
