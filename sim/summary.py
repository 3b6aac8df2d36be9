"""From the rows of single replications to one row per fleet, load and expert, with confidence bounds."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sim.metrics import CONSTANTS, COUNTS, LOAD_COLUMNS, Row, replication_columns

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
IDENTITY = ("fleet", *LOAD_COLUMNS, "expert", "replications")
MEANS = tuple(name for name in replication_columns() if name not in {*IDENTITY, *COUNTS, *CONSTANTS, "replication"})
_SHARES = np.array([name.endswith(("utilization", "kv_usage", "kv_usage_max", "_share")) for name in MEANS])
_TIMES = np.array([name.endswith("_ms") for name in MEANS])


def summary_columns() -> tuple[str, ...]:
    """Return the columns of a summary row; a metric ``m`` is followed by its bounds ``m_low`` and ``m_high``."""
    measured = (name for name in replication_columns() if name in {*MEANS, *CONSTANTS})
    bounded = ((name, f"{name}_low", f"{name}_high") if name in MEANS else (name,) for name in measured)
    return (*IDENTITY, *COUNTS, *(name for names in bounded for name in names))


def summary_rows(rows: Iterable[Row]) -> list[Row]:
    """Return one row per fleet, load and expert, in the order of first appearance.

    Counts are summed over replications. Every other figure is the mean over the replications that know it, with the
    bounds of its 95 % confidence interval (Student t; NaN with a single replication). Those of times are symmetric in
    the logarithm (delta method): a time is positive and its spread over runs is skewed.
    """
    groups: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        # NaN differs from itself, so it cannot be part of a key.
        key = tuple(None if row[name] != row[name] else row[name] for name in ("fleet", *LOAD_COLUMNS, "expert"))
        groups.setdefault(key, []).append(row)
    return [_summary_row(group) for group in groups.values()]


def summarize(rows: Iterable[Row]) -> "pd.DataFrame":
    """Return the rows of ``summary_rows`` as a frame with the columns of ``summary_columns``."""
    import pandas as pd

    return pd.DataFrame(summary_rows(rows), columns=list(summary_columns()))


def confidence_bounds(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Mean over axis 0 of (replications, metrics), NaN left out, and its lower and upper 95 % bound (Student t)."""
    if len(values) == 1:  # spares a single run the import of scipy
        return values[0], np.full_like(values[0], np.nan), np.full_like(values[0], np.nan)
    from scipy.special import stdtrit

    known = ~np.isnan(values)
    n = known.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # n of 0 or 1: NaN is the answer
        mean = np.where(known, values, 0).sum(axis=0) / n
        variance = np.where(known, np.square(values - mean), 0).sum(axis=0) / (n - 1)
        # The quantile of t with n - 1 degrees of freedom; stdtrit gives NaN for none.
        half = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.sqrt(variance / n)
    return mean, mean - half, mean + half


def _summary_row(group: list[Row]) -> Row:
    first = group[0]
    row: Row = {name: first[name] for name in ("fleet", *LOAD_COLUMNS, "expert")}
    row["replications"] = len(group)
    row |= {name: sum(each[name] for each in group) for name in COUNTS}
    row |= {name: first[name] for name in CONSTANTS}
    table = np.array([[each[name] for name in MEANS] for each in group], dtype=np.float64)
    means, lows, highs = confidence_bounds(table)
    times = _TIMES & (means > 0)
    half = np.divide(highs - means, means, out=np.zeros_like(means), where=times)
    lows = np.where(times, means * np.exp(-half), lows)
    highs = np.where(times, means * np.exp(half), highs)
    lows = np.maximum(lows, 0.0)  # no figure of a run is negative
    highs = np.where(_SHARES, np.minimum(highs, 1.0), highs)
    mean, low, high = means.tolist(), lows.tolist(), highs.tolist()
    for column, name in enumerate(MEANS):
        row |= {name: mean[column], f"{name}_low": low[column], f"{name}_high": high[column]}
    return {name: row[name] for name in summary_columns()}
