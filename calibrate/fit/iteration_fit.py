"""From iteration records to a profile of terms: what each part of an iteration's work costs.

The time of an observation (``calibrate.fit.iteration_observations``) is linear in non-negative parameters
once the form of the matrix work is given: a floor, as a number of tokens that is searched; or straight pieces between
knots, for hardware that works differently on small batches. The rest is non-negative least squares with Huber weights
(Huber 1964), so that a stall of the machine does not steer it. Such weights tell how terms stand to each other; but
times are skewed, on a machine with neighbours more so, and a server meets their mean. So all terms are then scaled
until the observations take as long together as they did, stalls apart. Knots are taken where they predict points left
out better. Intervals come from refits to resampled points, whole points at a time, errors from leaving each point out.

An asynchronous engine works on the host for the next batch while the device computes this one. What a batch takes there
is its own work on the host, which falls before the log line of the batch before it, and the wait for it; and the terms
above are those of batches that were waited for. The others tell what the host takes (``calibrate.fit.host_fit``), and
that the device took no longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from calibrate.fit.host_fit import HOST_TERMS, HostFit, fit_host
from calibrate.fit.iteration_observations import FEWEST_OBSERVATIONS, Floats, Observations, noise_s
from sim.cuda_graphs import padded_tokens
from sim.profile import HostParameters, MatrixKnot, Parameter, TermParameters, matrix_work_s
from sim.streams import stream

TERMS = ("per_iteration", "per_token", "per_attention_pair", "per_prefill_chunk", "per_decode", "per_kv_token")
"""What the time is linear in; ``weights`` is ``per_token`` times the floor."""
FLOORS = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens up to which matrix work may take no less time."""
KNOTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Tokens at which the matrix work may bend, where there are measurements beyond."""
BEND = 1.0
"""By what share of the mean slope a bend counts as much as one standard deviation of an observation."""
BETTER = 0.95
"""Knots are taken when points left out are lost by less than this share of the floor's loss."""
FOLDS = 5
HUBER = 1.5
STALL = 2.0
"""An observation of more than so many times its time is a stall: the next run meets it elsewhere, or not at all."""
RESAMPLES = 200
CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class TermFit:
    """A fit.

    Attributes:
        terms: parameters by name of TERMS.
        floor_tokens: of the matrix work; 0 with knots.
        graph_sizes: captured batch sizes, to which tokens are rounded up.
        knots: (tokens, seconds) of the matrix work beyond that of one token, see ``sim.profile.matrix_work_s``.
        host: below whose time no batch of an asynchronous engine stays; else None.
    """

    terms: dict[str, float]
    floor_tokens: int
    graph_sizes: tuple[int, ...]
    knots: tuple[tuple[int, float], ...] = ()
    host: HostFit | None = None

    def predict_s(self, works: Floats) -> Floats:
        """Return seconds of iterations, ``works`` as in ``Observations``."""
        device_s = self.device_s(works)
        return device_s if self.host is None else np.maximum(device_s, self.host.predict_s(works))

    def device_s(self, works: Floats) -> Floats:
        """Return the seconds that the terms say, whatever the host takes."""
        matrix = design(works, self.floor_tokens, self.graph_sizes)
        if self.knots:
            per_token_s = self.terms["per_token"]
            work_s = [matrix_work_s(tokens, self.knots, per_token_s) for tokens in matrix[:, 1]]
            matrix[:, 1] = np.array(work_s) / max(per_token_s, 1e-300)
        return np.asarray(matrix @ np.array([self.terms[name] for name in TERMS]))

    @property
    def weights_s(self) -> float:
        """The floor in seconds."""
        return self.terms["per_token"] * self.floor_tokens


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
    sizes = tuple(graph_sizes)
    host = _fit_host(seen, sizes)
    told = _telling(seen)
    best = _best_floor(told, sizes, floors, start)
    longer = ~seen.waited_for & (best.device_s(seen.works) > seen.measured_s)
    if longer.any() and told is not seen:  # the device cannot have taken longer than all of it
        best = _best_floor(seen.select(seen.waited_for | longer), sizes, floors, best)
    return replace(best, host=host)


def _best_floor(seen: Observations, sizes: tuple[int, ...], floors: Sequence[int], start: TermFit | None) -> TermFit:
    if start is None:
        start = _search(seen, sizes, floors, None, np.ones(len(seen.measured_s)))
    return _search(seen, sizes, floors, start, _noisier(seen, start))


def _search(
    seen: Observations, sizes: tuple[int, ...], floors: Sequence[int], start: TermFit | None, noisier: Floats
) -> TermFit:
    best: tuple[float, TermFit] | None = None
    largest = float((seen.works[:, 0] + seen.works[:, 4]).max())
    expected_s = seen.measured_s if start is None else np.maximum(start.device_s(seen.works), 1e-9)
    rounds = 30 if start is None else 6
    for floor in [each for each in floors if each <= largest] or [0]:
        matrix = design(seen.works, floor, sizes)
        loss, values = _solve(matrix, seen, noisier * noise_s(seen, expected_s), rounds=rounds)
        if best is None or loss < best[0] * (1 - 1e-9):
            named = {name: float(value) for name, value in zip(TERMS, values, strict=True)}
            best = loss, TermFit(terms=named, floor_tokens=floor, graph_sizes=sizes)
    assert best is not None
    return best[1]


def _noisier(seen: Observations, fitted: TermFit) -> Floats:
    """Return by what factor observations are noisier than assumed, those with prefill and those without; at least 1.

    The single iteration of a prefill is noisier than a mean of many, above all where log lines come late.
    """
    expected_s = np.maximum(fitted.device_s(seen.works), 1e-9)
    errors = np.abs(expected_s - seen.measured_s) / noise_s(seen, expected_s)
    factor = np.ones(len(errors))
    with_prefill = seen.works[:, 0] > 0
    for kind in (with_prefill, ~with_prefill):
        if kind.any():
            factor[kind] = max(1.0, float(np.median(errors[kind])) / 0.6745)
    return factor


def _telling(seen: Observations) -> Observations:
    """The observations that tell what the device takes; all, where there are too few such."""
    waited = seen.waited_for
    return seen if waited.all() or waited.sum() < FEWEST_OBSERVATIONS else seen.select(waited)


def _fit_host(seen: Observations, sizes: tuple[int, ...]) -> HostFit | None:
    if seen.host_s is None:
        return None
    return fit_host(seen.works, seen.host_s, seen.jitter_s * 2**0.5 / np.sqrt(seen.iterations), sizes)


def fit_knots(seen: Observations, floor_fit: TermFit) -> TermFit:
    """Return a fit with knots instead of a floor.

    Args:
        seen: at least a few.
        floor_fit: a fit with a floor to the same or other observations, for a start and for what a bend is weighed by.
    """
    told = _telling(seen)
    columns = design(told.works, 0, floor_fit.graph_sizes)
    tokens = columns[:, 1]
    knots = [knot for knot in KNOTS if (tokens > knot).any() and (tokens <= knot).any()]
    edges = np.array([1.0, *knots, np.inf])
    ramps = np.clip(tokens[:, None] - edges[:-1], 0.0, np.diff(edges))
    matrix = np.hstack([columns[:, :1], ramps, columns[:, 2:]])
    slopes = len(knots) + 1
    bends = np.zeros((slopes - 1, matrix.shape[1]))
    places = np.arange(slopes - 1)
    bends[places, places + 1], bends[places, places + 2] = -1.0, 1.0
    bends /= BEND * max(floor_fit.terms["per_token"], 1e-12)
    expected_s = np.maximum(floor_fit.device_s(told.works), 1e-9)
    deviation_s = _noisier(told, floor_fit) * noise_s(told, expected_s)
    _, values = _solve(matrix, told, deviation_s, rounds=12, penalty=bends)
    heights = np.cumsum(values[1:slopes] * np.diff(edges[:-1]))
    kept = [float(values[0]), *(float(value) for value in values[slopes:])]
    return TermFit(
        terms=dict(zip(TERMS, kept, strict=True)),
        floor_tokens=0,
        graph_sizes=floor_fit.graph_sizes,
        knots=tuple((knot, float(height)) for knot, height in zip(knots, heights, strict=True)),
        host=_fit_host(seen, floor_fit.graph_sizes),
    )


def _levelled(fitted: TermFit, seen: Observations) -> TermFit:
    """Return a fit whose predictions of the observations, all iterations together, are as long as they were."""
    told = _telling(seen)
    if not told.waited_for.all():  # what took so long may have been the host
        return fitted
    expected_s = fitted.device_s(told.works)
    weight = told.iterations * (told.measured_s < STALL * expected_s)
    level = float(told.measured_s @ weight) / max(float(expected_s @ weight), 1e-300)
    if not level:
        return fitted
    return replace(
        fitted,
        terms={name: level * value for name, value in fitted.terms.items()},
        knots=tuple((tokens, level * seconds) for tokens, seconds in fitted.knots),
    )


def refit(seen: Observations, like: TermFit, floors: Sequence[int] = FLOORS) -> TermFit:
    """Return a fit of the same form to other observations."""
    if like.knots:
        return _levelled(fit_knots(seen, like), seen)
    return _levelled(fit_terms(seen, graph_sizes=like.graph_sizes, floors=floors, start=like), seen)


def fit_best(seen: Observations, *, graph_sizes: Sequence[int] = ()) -> TermFit:
    """Return a fit with a floor, or with knots where that predicts points left out clearly better."""
    floor_fit = fit_terms(seen, graph_sizes=graph_sizes)
    names = np.unique(seen.points.astype(str))
    if len(names) < 2 * FOLDS:
        return _levelled(floor_fit, seen)
    lost = np.zeros(2)
    noisier = _noisier(seen, floor_fit)
    for fold in range(FOLDS):
        mine = np.isin(seen.points.astype(str), names[fold::FOLDS])
        told, others = seen.select(mine), seen.select(~mine)
        with_floor = refit(others, floor_fit)
        for form, fitted in enumerate((with_floor, fit_knots(others, with_floor))):
            deviation_s = noisier[mine] * noise_s(told, told.measured_s)
            errors = np.abs(fitted.predict_s(told.works) - told.measured_s) / deviation_s
            lost[form] += np.where(errors <= HUBER, errors**2 / 2, HUBER * (errors - HUBER / 2)).sum()
    return _levelled(fit_knots(seen, floor_fit) if lost[1] < BETTER * lost[0] else floor_fit, seen)


def _solve(
    matrix: Floats, seen: Observations, deviation_s: Floats, *, rounds: int, penalty: Floats | None = None
) -> tuple[float, Floats]:
    """Return the Huber loss and the parameters; ``penalty`` has rows whose products with them should be near 0."""
    extra = np.empty((0, matrix.shape[1])) if penalty is None else penalty
    scale = np.maximum(np.abs(matrix / seen.measured_s[:, None]).max(axis=0), 1e-300)
    weight = np.ones(len(deviation_s))
    values = np.zeros(matrix.shape[1])
    for _ in range(rounds):
        rows = weight / deviation_s
        stacked = np.vstack([matrix * rows[:, None], extra]) / scale
        new, _ = nnls(stacked, np.concatenate([seen.measured_s * rows, np.zeros(len(extra))]))
        new = new / scale
        settled = np.allclose(new, values, rtol=1e-6, atol=0)
        values = new
        errors = np.abs(matrix @ values - seen.measured_s) / deviation_s
        knee = HUBER * max(1.0, float(np.median(errors)) / 0.6745)  # a noisier machine than assumed is no outlier
        weight = np.sqrt(knee / np.maximum(errors, knee))
        if settled:
            break
    loss = np.where(errors <= knee, errors**2 / 2, knee * (errors - knee / 2)).sum()
    return float(loss), values


def term_parameters(
    seen: Observations, *, graph_sizes: Sequence[int] = (), resamples: int = RESAMPLES
) -> tuple[TermFit, TermParameters]:
    """Return the fit, and its parameters with 90 % intervals from refits to resampled points."""
    fitted = fit_best(seen, graph_sizes=graph_sizes)
    names = np.unique(seen.points.astype(str))
    rows_of = [np.flatnonzero(seen.points == name) for name in names]
    near = [floor for floor in FLOORS if fitted.floor_tokens / 4 <= floor <= 4 * max(fitted.floor_tokens, 4)]
    refits = [fitted]
    for number in range(resamples):
        drawn = stream(0, "points", number).integers(len(names), size=len(names))
        rows = np.concatenate([rows_of[index] for index in drawn])
        refits.append(refit(seen.select(rows), fitted, near))

    def parameter(values: list[float]) -> Parameter:
        low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        value = _digits(values[0])
        return Parameter(value=value, low=min(_digits(low), value), high=max(_digits(high), value))

    knots: list[MatrixKnot] = []
    for tokens, _ in fitted.knots:
        heights = [matrix_work_s(tokens, each.knots, each.terms["per_token"]) for each in refits]
        knots.append(MatrixKnot(tokens=tokens, seconds=parameter(heights)))
    terms = {name: parameter([each.terms[name] for each in refits]) for name in TERMS}
    hosts = [each.host for each in refits if each.host is not None]
    host = {name: parameter([each.terms[name] for each in hosts]) for name in HOST_TERMS} if hosts else {}
    return fitted, TermParameters(
        **terms,
        weights=parameter([each.weights_s for each in refits]),
        matrix_knots=knots,
        host=HostParameters(**host) if host else None,
    )


def held_out_errors(seen: Observations, fitted: TermFit) -> Floats:
    """Return relative errors on points that the fit had not seen: of each point's decode and prefill iterations.

    One error for all decode-only iterations of a point together and one for those with prefill, since what is wanted
    is their time and not the jitter of single log lines. ``fitted``, to all of them, says with which form.
    """
    errors = []
    for name in np.unique(seen.points.astype(str)):
        mine = seen.points == name
        if mine.all():
            continue
        others = refit(seen.select(~mine), fitted)
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


def _digits(value: float) -> float:
    """Four significant digits, so that a file does not change with the last bits of a solver."""
    return float(f"{float(value):.4g}")
