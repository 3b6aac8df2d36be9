"""Predicted against measured: every run simulated again, and the error of every figure with a prediction interval."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from math import isfinite, log, nan
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.predictor import CannotPredictError, PredictedEngine, Predictor
from calibrate.tables.measured_runs import MeasuredRequests, MeasuredRun
from calibrate.validate.conformal import interval_factors
from calibrate.validate.replay import Replay, replay

COVERAGE = 0.9

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow:
    """One figure of one run.

    Attributes:
        metric: one of ``METRICS``.
        measured, predicted, lower, upper: seconds, or tokens per second; predicted and its interval are NaN where the
            run was not simulated, the interval also where there are too few other experiments for one.
        ape_pct: absolute error in percent of the measured value.
        regime: of ``calibrate.validate.replay.REGIMES``; empty where not simulated.
        profile: what predicted it.
        note: what was assumed, or why it was not simulated.
    """

    run_id: str
    metric: str
    measured: float
    predicted: float
    lower: float
    upper: float
    ape_pct: float
    regime: str
    profile: str
    note: str

    @property
    def covered(self) -> bool:
        """Whether the measured value lies in the interval."""
        return self.lower <= self.measured <= self.upper


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRun:
    """A run that was not simulated."""

    run_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Outcome of ``validate``; ``rows`` has every measured figure, also of skipped runs, in the order of the runs."""

    runs: Mapping[str, MeasuredRun]
    rows: tuple[ErrorRow, ...]
    skipped: tuple[SkippedRun, ...]

    @property
    def predicted_rows(self) -> list[ErrorRow]:
        """The rows of runs that were simulated."""
        return [row for row in self.rows if row.profile]


def validate(
    runs: Sequence[MeasuredRun],
    requests: Mapping[str, MeasuredRequests],
    predictor_for: Callable[[str], Predictor],
    *,
    flagged: bool = False,
    seed: int = 1,
    replications: int = 3,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Simulate each run with the predictor for its experiment and return the errors.

    Args:
        runs: measured.
        requests: by ``run_id``, where recorded.
        predictor_for: called once for each experiment, with ``MeasuredRun.exp``; a predictor that was fitted on runs
            must leave that experiment out of its fit.
        flagged: also simulate runs with a flag.
        seed: of the load where it is not recorded.
        replications: of such loads.
        workers: processes; None: one per core.
        progress: told the share of the runs that is done.
    """
    predictor = cache(predictor_for)
    engines: dict[str, PredictedEngine] = {}
    reasons: dict[str, str] = {}
    for run in runs:
        try:
            engines[run.run_id] = _engine_of(run, predictor, flagged)
        except CannotPredictError as error:
            reasons[run.run_id] = str(error)
    replays: dict[str, Replay] = {}
    tasks = [(run, requests.get(run.run_id), engines[run.run_id]) for run in runs if run.run_id in engines]
    for done, (run_id, outcome) in enumerate(_replay_all(tasks, seed, replications, workers), start=1):
        if isinstance(outcome, Replay):
            replays[run_id] = outcome
        else:
            reasons[run_id] = outcome
        if progress is not None:
            progress(done / len(tasks))
    rows = []
    for run in runs:
        found = replays.get(run.run_id)
        label = engines[run.run_id].label if found is not None else ""
        rows += [_row(run, name, value, found, label, reasons) for name, value in run.measured().items()]
    by_id = {run.run_id: run for run in runs}
    return Validation(
        runs=by_id,
        rows=tuple(
            with_intervals(
                rows,
                {run.run_id: run.exp for run in runs},
                kinds={run.run_id: run.arch for run in runs},
                widening={run_id: found.range_widening for run_id, found in replays.items()},
            )
        ),
        skipped=tuple(SkippedRun(run_id=run_id, reason=reasons[run_id]) for run_id in by_id if run_id in reasons),
    )


def with_intervals(
    rows: Sequence[ErrorRow],
    experiments: Mapping[str, str],
    *,
    kinds: Mapping[str, str] | None = None,
    widening: Mapping[str, float] | None = None,
) -> list[ErrorRow]:
    """Return the rows with ``lower`` and ``upper`` by the errors of the same metric in other experiments of its kind.

    Args:
        rows: of any metrics.
        experiments: run_id -> experiment.
        kinds: run_id -> what its errors are compared within, such as dense models; None: all together.
        widening: run_id -> how large an error is thought to be, relative to one inside the fitted range; None: alike.
    """
    found = list(rows)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        if row.predicted > 0 and row.measured > 0:
            groups.setdefault((row.metric, "" if kinds is None else kinds[row.run_id]), []).append(place)
    for places in groups.values():
        ids = [rows[place].run_id for place in places]
        errors = np.array([abs(log(rows[place].measured / rows[place].predicted)) for place in places])
        units = np.array([1.0 if widening is None else widening[run_id] for run_id in ids])
        factors = interval_factors(errors, [experiments[run_id] for run_id in ids], COVERAGE, units)
        for place, factor in zip(places, factors.tolist(), strict=True):
            row = rows[place]
            if isfinite(factor):
                found[place] = replace(row, lower=row.predicted / factor, upper=row.predicted * factor)
    return found


def write_errors(validation: Validation, path: Path) -> None:
    """Write the rows as CSV, NaN as empty cells; figures have six significant digits."""
    import csv

    columns = [field.name for field in fields(ErrorRow)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(getattr(row, column)) for column in columns] for row in validation.rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if isfinite(value) else ""
    return str(value)


def _engine_of(run: MeasuredRun, predictor: Callable[[str], Predictor], flagged: bool) -> PredictedEngine:
    if run.flag and not flagged:
        raise CannotPredictError(f"flagged: {run.flag}")
    if not run.measured():
        raise CannotPredictError("none of the figures to compare was measured")
    return predictor(run.exp).engine_of(run)


def _replay_all(
    tasks: Sequence[tuple[MeasuredRun, MeasuredRequests | None, PredictedEngine]],
    seed: int,
    replications: int,
    workers: int | None,
) -> Any:
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        return (_replay_one(*task, seed, replications) for task in tasks)
    from joblib import Parallel, delayed

    # The most requests first, so that no core is left alone with them at the end.
    ordered = sorted(tasks, key=lambda task: -(task[0].n_requests or 0))
    return Parallel(n_jobs=workers, return_as="generator_unordered")(
        delayed(_replay_one)(*task, seed, replications) for task in ordered
    )


def _replay_one(
    run: MeasuredRun, requests: MeasuredRequests | None, engine: PredictedEngine, seed: int, replications: int
) -> tuple[str, Replay | str]:
    """Return a run's replay, or why there is none."""
    try:
        return run.run_id, replay(run, requests, engine, seed=seed, replications=replications)
    except CannotPredictError as error:
        return run.run_id, str(error)


def _row(
    run: MeasuredRun, metric: str, measured: float, found: Replay | None, label: str, reasons: Mapping[str, str]
) -> ErrorRow:
    predicted = nan if found is None else found.figures[metric]
    return ErrorRow(
        run_id=run.run_id,
        metric=metric,
        measured=measured,
        predicted=predicted,
        lower=nan,
        upper=nan,
        ape_pct=abs(predicted / measured - 1) * 100 if measured > 0 else nan,
        regime="" if found is None else found.regime,
        profile=label,
        note=f"not simulated: {reasons[run.run_id]}" if found is None else "; ".join(found.notes),
    )
