"""Predicted figures beside measured ones: the error of each, whether it passes, and whether the interval held it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np
from numpy.typing import NDArray

from sim.check_spec import CheckSpec, ToleranceSpec
from sim.metrics import Requests, completed_in_window, e2el_s, tpot_s, ttft_s
from sim.records import RunRecord
from sim.result import Result
from sim.spec import ALL_EXPERTS
from sim.streams import stream

JUDGED: dict[str, str] = {
    # column -> field of ToleranceSpec
    "request_throughput": "throughput",
    "output_throughput": "throughput",
    "mean_e2el_ms": "e2el_mean",
    "mean_tpot_ms": "tpot_mean",
    "mean_ttft_ms": "ttft_mean",
    "p99_e2el_ms": "p99",
    "p99_tpot_ms": "p99",
    "p99_ttft_ms": "p99",
}
SHOWN = tuple(
    f"{statistic}_{metric}_ms"
    for metric in ("ttft", "tpot", "itl", "e2el")
    for statistic in ("mean", "median", "p90", "p99")
)
COLUMNS = ("request_throughput", "output_throughput", *SHOWN)
"""Every figure of the comparison, by its name in ``sim.metrics``."""

_Rows = Mapping[tuple[float, str], Mapping[str, float]]
"""(load, expert) -> column -> figure."""

RESAMPLES = 400
BLOCKS = 20
CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure at one load, predicted and measured.

    Attributes:
        load: users, or requests per second; NaN for a trace.
        expert: its name, or ``all``.
        column: of COLUMNS; milliseconds where the name ends in ``_ms``, else per second.
        predicted: mean over the runs' draws of requests.
        predicted_low, predicted_high: 90 % interval of the prediction for one real run.
        measured: mean over repeated runs.
        measured_low, measured_high: its 90 % bootstrap interval; NaN where it cannot be resampled.
        noise_floor: relative standard deviation of one real run among repeated ones, pooled over the loads; NaN for
            single ones.
        tolerance: largest relative error that passes; NaN for a figure that is shown and not judged.
        noise_floors: how many noise floors pass as well.
        predicted_at_pace: predicted once more with the iteration times that the engines had; NaN where not known.
    """

    load: float
    expert: str
    column: str
    predicted: float
    predicted_low: float
    predicted_high: float
    measured: float
    measured_low: float
    measured_high: float
    noise_floor: float
    tolerance: float
    noise_floors: float
    predicted_at_pace: float = nan

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else nan

    @property
    def error_at_pace(self) -> float:
        """The error that is left when the engines' own pace is put in."""
        return (self.predicted_at_pace - self.measured) / self.measured if self.measured else nan

    @property
    def limit(self) -> float:
        """Largest relative error that passes here: the tolerance, or the noise where that is larger."""
        floor = 0.0 if isnan(self.noise_floor) else self.noise_floors * self.noise_floor
        return max(self.tolerance, floor)

    @property
    def within_tolerance(self) -> bool:
        """Whether the error is within the tolerance, whatever the noise."""
        return abs(self.error) <= self.tolerance

    @property
    def passes(self) -> bool | None:
        """Whether the error is within the limit; None for a figure that is not judged or not known."""
        if isnan(self.tolerance) or isnan(self.error):
            return None
        return abs(self.error) <= self.limit

    @property
    def covered(self) -> bool | None:
        """Whether the measured figure lies in the predicted interval; None where either is unknown."""
        if isnan(self.measured) or isnan(self.predicted_low) or isnan(self.predicted_high):
            return None
        return self.predicted_low <= self.measured <= self.predicted_high


def compare(
    predicted: Sequence[Result],
    bounds: Sequence[Sequence[Result]],
    measured: Sequence[Result],
    fleet: str,
    spec: CheckSpec,
    *,
    at_pace: Sequence[Result] = (),
) -> list[Figure]:
    """Return every figure of one fleet at every load that both sides have, the fleet's own first.

    Args:
        predicted: simulated with the traffic of each measured run.
        bounds: simulated with iteration times at the ends of their interval, and with other draws of the traffic; what
            belongs together is averaged.
        measured: repeated real runs, one result each.
        fleet: its name in both.
        spec: tolerances.
        at_pace: simulated with the iteration times that the engines had, each at some of the loads.
    """
    simulated = [_rows(result, fleet) for result in predicted]
    central = _mean_rows(simulated)
    paced = _mean_rows([_rows(result, fleet) for result in at_pace])
    spread = [_mean_rows([_rows(result, fleet) for result in together]) for together in bounds]
    real = [_rows(result, fleet) for result in measured]
    floors = _noise_floors(simulated, real)
    figures = []
    for (load, expert), row in central.items():
        if not all((load, expert) in rows for rows in real) or not real:
            continue
        resampled = _resampled([_record(result, fleet, load) for result in measured], expert)
        for column in COLUMNS:
            values = np.array([rows[load, expert][column] for rows in real], dtype=np.float64)
            around = [float(rows[load, expert][column]) for rows in spread if (load, expert) in rows]
            low, high = resampled.get(column, (nan, nan))
            mean = float(values.mean())
            figures.append(
                Figure(
                    load=load,
                    expert=expert,
                    column=column,
                    predicted=float(row[column]),
                    predicted_low=min([float(row[column]), *around]) if around else nan,
                    predicted_high=max([float(row[column]), *around]) if around else nan,
                    measured=mean,
                    measured_low=low,
                    measured_high=high,
                    noise_floor=floors.get((expert, column), nan),
                    tolerance=_tolerance(spec.tolerances, column) if expert == ALL_EXPERTS else nan,
                    noise_floors=spec.tolerances.noise_floors,
                    predicted_at_pace=float(paced[load, expert][column]) if (load, expert) in paced else nan,
                )
            )
    return figures


def is_load(load: float, other: float) -> bool:
    """Whether two loads are the same; all traces are one, NaN."""
    return load == other or (isnan(load) and isnan(other))


def coverage(figures: Sequence[Figure]) -> float:
    """Return the share of the fleet's measured figures inside their predicted intervals; NaN for none."""
    known = [figure.covered for figure in figures if figure.expert == ALL_EXPERTS and figure.covered is not None]
    return sum(known) / len(known) if known else nan


def _noise_floors(simulated: Sequence[_Rows], real: Sequence[_Rows]) -> dict[tuple[str, str], float]:
    """Return (expert, column) -> relative standard deviation between repeated real runs, pooled over the loads.

    Each repeat has its own draw of requests. So the measured figures differ by the draws besides, and measured over
    predicted by what the predictions differ without cause: both say too much, and the smaller is taken. Two or three
    repeats of one load tell little of their spread, and by chance now and then almost none; the loads ran on the same
    machine in turn, so their variances are taken together.
    """
    floors: dict[tuple[str, str], float] = {}
    if len(real) < 2:
        return floors
    pairs = list(zip(simulated, real, strict=True))
    shared = [key for key in real[0] if all(key in ours and key in theirs for ours, theirs in pairs)]
    for expert in dict.fromkeys(expert for _, expert in shared):
        keys = [key for key in shared if key[1] == expert]
        for column in COLUMNS:
            measured = np.array([[theirs[key][column] for _, theirs in pairs] for key in keys])
            predicted = np.array([[ours[key][column] for ours, _ in pairs] for key in keys])
            with np.errstate(invalid="ignore", divide="ignore"):
                known = [spread for spread in (_spread(measured), _spread(measured / predicted)) if not isnan(spread)]
            if known:
                floors[expert, column] = min(known)
    return floors


def _spread(values: NDArray[np.float64]) -> float:
    """Root mean square of the rows' relative standard deviations; NaN where none is known."""
    variances = (values.std(axis=1, ddof=1) / values.mean(axis=1)) ** 2
    known = variances[np.isfinite(variances)]
    return float(np.sqrt(known.mean())) if len(known) else nan


def _tolerance(tolerances: ToleranceSpec, column: str) -> float:
    return float(getattr(tolerances, JUDGED[column])) if column in JUDGED else nan


def _rows(result: Result, fleet: str) -> _Rows:
    """The figures of a result's first replication by load and expert."""
    return {
        (_load(row), row["expert"]): {column: float(row[column]) for column in COLUMNS}
        for row in result.replication_rows
        if row["fleet"] == fleet and row["replication"] == 0
    }


def _mean_rows(several: Sequence[_Rows]) -> _Rows:
    """The mean of every figure over those that have it."""
    found: dict[tuple[float, str], list[Mapping[str, float]]] = {}
    for rows in several:
        for key, row in rows.items():
            found.setdefault(key, []).append(row)
    return {
        key: {column: float(np.mean([row[column] for row in rows])) for column in COLUMNS}
        for key, rows in found.items()
    }


def _load(row: Mapping[str, float]) -> float:
    return row["rate_rps"] if isnan(row["users"]) else row["users"]


def _record(result: Result, fleet: str, load: float) -> RunRecord:
    return next(run for run in result.runs if run.fleet == fleet and is_load(run.load, load))


# ------------------------------------------------------------------------------------------------------- bootstrap

_TIMES: dict[str, Callable[[Requests], NDArray[np.float64]]] = {"ttft": ttft_s, "tpot": tpot_s, "e2el": e2el_s}


def _resampled(records: Sequence[RunRecord], expert: str) -> dict[str, tuple[float, float]]:
    """Return 90 % bootstrap bounds of the mean over repeated runs, by column.

    Requests that complete one after the other share a batch, so they are resampled in blocks of successive completions
    (moving blocks; Kunsch 1989), each with the time its completions took.
    """
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    for number, record in enumerate(records):
        for column, values in _draws(record, expert, number).items():
            drawn.setdefault(column, []).append(values)
    edges = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    bounds = {}
    for column, parts in drawn.items():
        low, high = np.quantile(np.mean(parts, axis=0), edges)
        bounds[column] = float(low), float(high)
    return bounds


def _draws(record: RunRecord, expert: str, number: int) -> dict[str, NDArray[np.float64]]:
    chosen = completed_in_window(record)
    if expert != ALL_EXPERTS:
        chosen &= record.requests["expert_index"] == record.expert_names.index(expert)
    order = np.argsort(record.requests["last_token_s"][chosen], kind="stable")
    requests = {name: column[chosen][order] for name, column in record.requests.items()}
    count = len(order)
    if count < BLOCKS:
        return {}
    gaps_s = np.diff(requests["last_token_s"], prepend=record.window_s[0])
    size = max(1, count // BLOCKS)
    starts = stream(0, "blocks", number).integers(0, count - size + 1, (RESAMPLES, -(-count // size)))
    picked = (starts[:, :, None] + np.arange(size)).reshape(RESAMPLES, -1)
    time_s = gaps_s[picked].sum(axis=1)
    values: dict[str, NDArray[np.float64]] = {
        "request_throughput": picked.shape[1] / time_s,
        "output_throughput": requests["output_tokens"][picked].sum(axis=1) / time_s,
    }
    for metric, of in _TIMES.items():
        table = of(requests)[picked] * 1e3
        values[f"mean_{metric}_ms"] = np.nanmean(table, axis=1)
        median, p90, p99 = np.nanpercentile(table, (50, 90, 99), axis=1)
        values |= {f"median_{metric}_ms": median, f"p90_{metric}_ms": p90, f"p99_{metric}_ms": p99}
    return values
