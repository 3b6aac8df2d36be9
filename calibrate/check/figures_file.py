"""Every figure of a check as a row of ``check.csv``, written and read again."""

import csv
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from calibrate.check.comparison import JUDGED, Figure
from sim.check_spec import ToleranceSpec
from sim.spec import ALL_EXPERTS

FIGURES_FILE = "check.csv"
COLUMNS = (
    *("load", "expert", "metric", "predicted", "predicted_low", "predicted_high"),
    *("measured", "measured_low", "measured_high", "error_pct", "noise_floor_pct", "limit_pct", "passes", "covered"),
    "error_at_pace_pct",
)


def write_figures(path: Path, figures: Sequence[Figure]) -> None:
    """Write every figure, a row each."""
    write_rows(path, COLUMNS, [_row(figure) for figure in figures])


def read_figures(path: Path, tolerances: ToleranceSpec) -> list[Figure]:
    """Return the figures of a file that ``write_figures`` wrote, to the six digits that it keeps.

    Args:
        path: the file.
        tolerances: the fleet's figures are judged by.

    Raises:
        OSError, KeyError, ValueError: it cannot be read, or is no such file.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        return [_figure(row, tolerances) for row in csv.DictReader(stream)]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table; what is not known stays empty."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_text(value) for value in row] for row in rows)


def _row(figure: Figure) -> tuple[Any, ...]:
    return (
        *(figure.load, figure.expert, figure.column, figure.predicted, figure.predicted_low, figure.predicted_high),
        *(figure.measured, figure.measured_low, figure.measured_high, 100 * figure.error, 100 * figure.noise_floor),
        *(100 * figure.limit if not isnan(figure.tolerance) else nan, figure.passes, figure.covered),
        100 * figure.error_at_pace,
    )


def _figure(row: dict[str, str], tolerances: ToleranceSpec) -> Figure:
    def number(name: str) -> float:
        return float(row[name]) if row[name] else nan

    judged = row["expert"] == ALL_EXPERTS and row["metric"] in JUDGED
    return Figure(
        load=number("load"),
        expert=row["expert"],
        column=row["metric"],
        predicted=number("predicted"),
        predicted_low=number("predicted_low"),
        predicted_high=number("predicted_high"),
        measured=number("measured"),
        measured_low=number("measured_low"),
        measured_high=number("measured_high"),
        noise_floor=number("noise_floor_pct") / 100,
        tolerance=float(getattr(tolerances, JUDGED[row["metric"]])) if judged else nan,
        noise_floors=tolerances.noise_floors,
        predicted_at_pace=(1 + number("error_at_pace_pct") / 100) * number("measured"),
    )


def _text(value: Any) -> Any:
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
