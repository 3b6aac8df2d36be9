"""A check for people: tables on a terminal, a picture, and files with every figure."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from calibrate.check.comparison import Figure, is_load
from calibrate.check.figures_file import FIGURES_FILE, write_figures, write_rows
from calibrate.check.pace import Pace
from calibrate.check.station_times import StationTime
from sim.report import BOX, number_text
from sim.spec import ALL_EXPERTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

    from calibrate.check.check import CheckOutcome

Columns = Sequence[tuple[str, str]]
"""Figures by their columns in ``sim.metrics``, each with a heading."""

TABLE: Columns = (
    ("output_throughput", "tokens/s"),
    ("mean_ttft_ms", "TTFT mean"),
    ("p99_ttft_ms", "TTFT p99"),
    ("mean_tpot_ms", "TPOT mean"),
    ("p99_tpot_ms", "TPOT p99"),
    ("median_itl_ms", "ITL median"),
    ("mean_e2el_ms", "E2E mean"),
    ("p99_e2el_ms", "E2E p99"),
)
PANELS = (
    ("output_throughput", "output tokens/s"),
    ("mean_ttft_ms", "TTFT mean, ms"),
    ("p99_ttft_ms", "TTFT p99, ms"),
    ("mean_tpot_ms", "TPOT mean, ms"),
    ("mean_e2el_ms", "E2E mean, ms"),
    ("p99_e2el_ms", "E2E p99, ms"),
)
AT_PACE_SHOWN = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "p99_e2el_ms")
PACE_TITLE = "time of the engines' iterations as a multiple of what the profile says of the same batches"
STATION_SHOWN_S = 0.0005  # a difference below half a millisecond says nothing


def print_check(outcome: "CheckOutcome", console: Console) -> None:
    """Print the comparison, the stations, the batches, the pace, and the verdict."""
    console.print(figure_table(outcome.figures))
    console.print(station_table(outcome.stations))
    console.print(_batch_table(outcome))
    if outcome.paces:
        console.print(_pace_table(outcome.paces))
        console.print(_at_pace_table(outcome.figures))
    for line in outcome.remarks():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def write_check(outcome: "CheckOutcome", folder: Path) -> list[Path]:
    """Write a comparison's tables (CSV), picture and Markdown page into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in (FIGURES_FILE, "stations.csv", "pace.csv", "check.png", "check.md")]
    write_figures(paths[0], outcome.figures)
    write_rows(
        paths[1],
        ("load", "expert", "station", "simulated_s", "measured_s"),
        [(row.load, row.expert, row.station, row.simulated_s, row.measured_s) for row in outcome.stations],
    )
    names = ("load", "expert", "pace", "low", "high", "iterations", "known")
    write_rows(paths[2], names, [tuple(getattr(pace, name) for name in names) for pace in outcome.paces])
    from sim.plots import save_picture

    save_picture(check_picture(outcome.figures, outcome.title), paths[3], "png")
    paths[4].write_text(check_markdown(outcome), encoding="utf-8")
    return paths


def check_markdown(outcome: "CheckOutcome") -> str:
    """Return the comparison of the fleet as a Markdown page."""
    fleet = [figure for figure in outcome.figures if figure.expert == ALL_EXPERTS]
    remarks = [f"{'  ' * line.startswith('  ')}- {line.strip()}" for line in outcome.remarks()]
    lines = [f"# {outcome.title}", "", *remarks, "", "![predicted and measured](check.png)", ""]
    lines += ["Predicted / measured (error); bold: outside its tolerance and the noise.", ""]
    lines += figure_markdown(fleet)
    if outcome.paces:
        lines += _pace_lines(outcome.paces, fleet)
    lines += ["", "Mean milliseconds of a request at each station, simulated / measured:", ""]
    lines += station_markdown(outcome.stations)
    return "\n".join(lines) + "\n"


def figure_markdown(figures: Sequence[Figure], columns: Columns = TABLE) -> list[str]:
    """Return the lines of a table: a row a load, a column a figure."""
    lines = [f"| load | {' | '.join(head for _, head in columns)} |", f"| ---: |{' ---: |' * len(columns)}"]
    for load in _loads(figures):
        at = {figure.column: figure for figure in figures if is_load(figure.load, load)}
        lines.append(f"| {load:g} | {' | '.join(_markdown_cell(at[column]) for column, _ in columns)} |")
    return lines


def station_markdown(rows: Sequence[StationTime]) -> list[str]:
    """Return the lines of a table: a row a load and expert, a column a station."""
    stations = list(dict.fromkeys(row.station for row in rows))
    lines = [f"| load | expert | {' | '.join(stations)} |", f"| ---: | --- |{' ---: |' * len(stations)}"]
    for load, expert in dict.fromkeys((row.load, row.expert) for row in rows):
        cells = [
            f"{number_text(row.simulated_s * 1e3)} / {number_text(row.measured_s * 1e3)}"
            for row in rows
            if (row.load, row.expert) == (load, expert)
        ]
        lines.append(f"| {load:g} | {expert} | {' | '.join(cells)} |")
    return lines


def _pace_lines(paces: Sequence[Pace], figures: Sequence[Figure]) -> list[str]:
    """The engines' pace, and the errors that are left with it put in, as Markdown."""
    columns = [(column, head) for column, head in TABLE if column in AT_PACE_SHOWN]
    lines = ["", f"{PACE_TITLE}; errors when that pace is put into the prediction:", ""]
    heads = " | ".join(head for _, head in columns)
    lines += [
        f"| load | pace | {heads} |",
        f"| ---: | --- |{' ---: |' * len(columns)}",
    ]
    for load in _loads(figures):
        pace = ", ".join(f"{each.expert} {each.pace:.3f}" for each in paces if is_load(each.load, load))
        at = {figure.column: figure for figure in figures if is_load(figure.load, load)}
        lines.append(
            f"| {load:g} | {pace} | {' | '.join(_percent(at[column].error_at_pace) for column, _ in columns)} |"
        )
    return lines


def check_picture(figures: Sequence[Figure], title: str) -> "Picture":
    """Return a panel a figure: the prediction with its interval, and the measured values with theirs."""
    import matplotlib as mpl

    from sim.plots import COLOURS, GREY, STYLE

    fleet = [figure for figure in figures if figure.expert == ALL_EXPERTS]
    with mpl.rc_context(STYLE):
        from matplotlib.figure import Figure as Picture

        picture = Picture(figsize=(12, 6.6), layout="constrained")
        axes = picture.subplots(2, 3).ravel()
        for ax, (column, heading) in zip(axes, PANELS, strict=True):
            rows = sorted((figure for figure in fleet if figure.column == column), key=lambda figure: figure.load)
            loads = np.array([row.load for row in rows])
            bounds = [row.predicted_low for row in rows], [row.predicted_high for row in rows]
            label = _with_interval("predicted", bounds[0], "90 % interval")
            ax.plot(loads, [row.predicted for row in rows], color=COLOURS[0], label=label)
            ax.fill_between(loads, *bounds, color=COLOURS[0], alpha=0.2, linewidth=0)
            measured = np.array([row.measured for row in rows])
            spread = np.array([[row.measured - row.measured_low, row.measured_high - row.measured] for row in rows]).T
            known = np.nan_to_num(np.maximum(spread, 0.0)) if len(rows) else None
            label = _with_interval("measured", [row.measured_low for row in rows], "90 % bootstrap")
            ax.errorbar(loads, measured, yerr=known, fmt="o", color=COLOURS[1], capsize=3, label=label)
            ax.set_title(heading, loc="left", color=GREY)
            ax.set_xscale("log")
            ax.set_ylim(bottom=0)
            ax.set_xticks(loads, [f"{load:g}" for load in loads])
            ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            ax.set_xlabel("users")
        axes[0].legend(frameon=False, fontsize=8)
        picture.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return picture


def _with_interval(what: str, bounds: Sequence[float], interval: str) -> str:
    """Name a series, with its interval where it has one."""
    return what if all(isnan(bound) for bound in bounds) else f"{what}, {interval}"


def _loads(figures: Sequence[Figure]) -> list[float]:
    return sorted({figure.load for figure in figures})


def figure_table(figures: Sequence[Figure], columns: Columns = TABLE) -> Table:
    """Return a table for terminals: a row a load and expert, a column a figure."""
    table = Table(
        title="predicted / measured, error; * outside tolerance and noise",
        title_justify="left",
        box=BOX,
        title_style="bold",
    )
    table.add_column("load", justify="right")
    table.add_column("expert")
    for _, head in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for load in _loads(figures):
        for expert in dict.fromkeys(figure.expert for figure in figures):
            at = {f.column: f for f in figures if is_load(f.load, load) and f.expert == expert}
            if at:
                table.add_row(f"{load:g}", expert, *(_cell(at[column]) for column, _ in columns))
        table.add_section()
    return table


def _cell(figure: Figure) -> str:
    mark = "*" if figure.passes is False else ""
    return f"{number_text(figure.predicted)} / {number_text(figure.measured)}\n{_percent(figure.error)}{mark}"


def _markdown_cell(figure: Figure) -> str:
    error = f"**{_percent(figure.error)}**" if figure.passes is False else _percent(figure.error)
    return f"{number_text(figure.predicted)} / {number_text(figure.measured)} ({error})"


def _percent(share: float) -> str:
    return "-" if isnan(share) else f"{share:+.1%}"


def station_table(rows: Sequence[StationTime], what: str = "mean") -> Table:
    """Return a table for terminals: a row a load and expert, a column a station; ``what`` its times are."""
    table = Table(
        title=f"{what} ms of a request at each station, simulated / measured; the largest difference in bold",
        title_justify="left",
        box=BOX,
        title_style="bold",
    )
    stations = list(dict.fromkeys(row.station for row in rows))
    table.add_column("load", justify="right")
    table.add_column("expert")
    for station in stations:
        table.add_column(station, justify="right")
    for load, expert in dict.fromkeys((row.load, row.expert) for row in rows):
        at = [row for row in rows if (row.load, row.expert) == (load, expert)]
        apart = [abs(row.simulated_s - row.measured_s) for row in at]
        known = [value for value in apart if not isnan(value)]
        worst = max(known, default=0.0)
        cells = []
        for row, value in zip(at, apart, strict=True):
            text = f"{number_text(row.simulated_s * 1e3)} / {number_text(row.measured_s * 1e3)}"
            cells.append(f"[bold]{text}[/bold]" if value == worst and worst > STATION_SHOWN_S else text)
        table.add_row(f"{load:g}", expert, *cells)
    return table


def _pace_table(paces: Sequence[Pace]) -> Table:
    table = Table(title=PACE_TITLE, title_justify="left", box=BOX, title_style="bold")
    for name in ("load", "expert", "pace", "of the runs", "iterations", "batches known"):
        table.add_column(name, justify="left" if name == "expert" else "right")
    for pace in paces:
        table.add_row(
            *(f"{pace.load:g}", pace.expert, f"{pace.pace:.3f}", f"{pace.low:.3f} to {pace.high:.3f}"),
            *(f"{pace.iterations:,}", f"{pace.known:.0%}"),
        )
    return table


def _at_pace_table(figures: Sequence[Figure]) -> Table:
    table = Table(
        title="errors of the fleet's figures when that pace is put into the prediction",
        title_justify="left",
        box=BOX,
        title_style="bold",
    )
    table.add_column("load", justify="right")
    for _, head in TABLE:
        table.add_column(head, justify="right")
    fleet = [figure for figure in figures if figure.expert == ALL_EXPERTS]
    for load in _loads(fleet):
        at = {figure.column: figure for figure in fleet if is_load(figure.load, load)}
        table.add_row(f"{load:g}", *(_percent(at[column].error_at_pace) for column, _ in TABLE))
    return table


def _batch_table(outcome: "CheckOutcome") -> Table:
    table = Table(
        title="requests per iteration at the highest load, share of iterations: simulated / measured",
        title_justify="left",
        box=BOX,
        title_style="bold",
    )
    table.add_column("replica")
    shares = np.array(list(outcome.batches.values())).reshape(-1, 2, len(outcome.batch_bins))
    found = [int(place) for place in np.flatnonzero((np.nan_to_num(shares) > 0).any(axis=(0, 1)))]
    for place in found:
        table.add_column(outcome.batch_bins[place], justify="right")
    for replica, (simulated, measured) in zip(outcome.batches, shares, strict=True):
        table.add_row(replica, *(f"{simulated[place]:.0%} / {measured[place]:.0%}" for place in found))
    return table
