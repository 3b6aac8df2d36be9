"""Errors of a validation summed up by model, GPU, regime and metric."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from calibrate.tables.measured_runs import METRICS, MeasuredRun
from calibrate.tables.run_engine import gpu_of_run
from calibrate.validate.validate import ErrorRow, Validation

KEY_METRICS = ("ttft_mean", "tpot_mean", "e2e_mean", "e2e_p99", "itl_p50", "output_throughput")
"""Metrics of the tables by group and of the picture, where measured."""


class ErrorSummary(NamedTuple):
    """Errors of one metric over a group of runs.

    Attributes:
        runs: how many.
        mean_pct, median_pct, p90_pct: of the absolute errors.
        bias_pct: mean of the signed errors, positive where predictions are too high.
        covered: share of the measured values inside their intervals; NaN without intervals.
    """

    runs: int
    mean_pct: float
    median_pct: float
    p90_pct: float
    bias_pct: float
    covered: float


GROUPINGS: dict[str, Callable[[MeasuredRun, ErrorRow], str]] = {
    "model": lambda run, row: f"{run.model.split('/')[-1]}{' (mixture)' if run.arch == 'moe' else ''}",
    "GPU": lambda run, row: gpu_of_run(run).name,
    "regime": lambda run, row: row.regime,
    "architecture": lambda run, row: "mixture" if run.arch == "moe" else "dense",
    "source": lambda run, row: run.run_id.split("/")[0],
}


def summaries(
    validation: Validation, group_of: Callable[[MeasuredRun, ErrorRow], str] | None = None
) -> dict[str, dict[str, ErrorSummary]]:
    """Return group -> metric -> errors, metrics in the order of ``METRICS``; without a grouping one group, ``all``."""
    groups: dict[str, dict[str, list[ErrorRow]]] = {}
    for row in validation.predicted_rows:
        name = "all" if group_of is None else group_of(validation.runs[row.run_id], row)
        groups.setdefault(name, {}).setdefault(row.metric, []).append(row)
    return {
        name: {metric: summary(by_metric[metric]) for metric in METRICS if metric in by_metric}
        for name, by_metric in sorted(groups.items())
    }


def summary(rows: Sequence[ErrorRow]) -> ErrorSummary:
    """Sum up rows of one metric; those whose prediction is undefined are not counted."""
    rows = [row for row in rows if isfinite(row.ape_pct)]
    if not rows:
        return ErrorSummary(0, *[np.nan] * 5)
    absolute = np.array([row.ape_pct for row in rows])
    signed = np.array([100 * (row.predicted / row.measured - 1) for row in rows])
    with_interval = [row.covered for row in rows if isfinite(row.upper)]
    return ErrorSummary(
        runs=len(rows),
        mean_pct=float(absolute.mean()),
        median_pct=float(np.median(absolute)),
        p90_pct=float(np.percentile(absolute, 90)),
        bias_pct=float(signed.mean()),
        covered=float(np.mean(with_interval)) if with_interval else np.nan,
    )


def skipped_by_reason(validation: Validation) -> list[tuple[str, list[str]]]:
    """Return (reason, runs) for what was not simulated, the commonest reason first."""
    counts = Counter(skipped.reason for skipped in validation.skipped)
    return [
        (reason, [skipped.run_id for skipped in validation.skipped if skipped.reason == reason])
        for reason, _ in counts.most_common()
    ]


def shown_pct(value: float) -> str:
    """Return a percentage with one decimal, a dash for NaN."""
    return f"{value:.1f}" if isfinite(value) else "-"


def common_start(names: Iterable[str]) -> str:
    """Return names shortened for a line: the first, and how many more."""
    first, *others = names
    return first + (f" and {len(others)} more" if others else "")


def mean_and_median(found: ErrorSummary | None) -> str:
    """Return ``mean / median``, empty where nothing was measured."""
    if found is None or not isfinite(found.mean_pct):
        return ""
    return f"{shown_pct(found.mean_pct)} / {shown_pct(found.median_pct)}"
