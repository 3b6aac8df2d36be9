"""The pictures of a result: time to first token, time per output token and output throughput, one line a fleet.

Over several loads the pictures are curves; for a single load they compare the fleets; for a trace they are the
distribution of latencies of each expert. Figures are built without pyplot, so no global state or display is touched.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from sim.metrics import Floats, Row, completed_in_window, e2el_s, tpot_s, ttft_s
from sim.result import Result, loads_label
from sim.spec import ALL_EXPERTS

# Okabe and Ito's colours, which colour-blind readers can tell apart, with brown for the yellow that vanishes on white.
# Markers repeat the distinction in print; more than eight fleets repeat colours with other markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B5A2B")
TRACE_COLOURS = (*COLOURS[:6], "#999999", "#8B5A2B")  # there black is for all experts together
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "expert-router",  # element ids from contents, not at random
    "text.parse_math": False,  # a $ in a fleet's name is a $
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
LABEL_GAP = 0.052  # of the height of an axis, between the labels of two lines
SLO_IN_SIGHT = 2.5  # a bound beyond this multiple of the highest value would press the lines flat
LINEAR_UP_TO = 20  # latencies that differ by less than this factor share a linear axis from zero


class Picture(NamedTuple):
    """What one picture shows: a panel for each (column of the summary, its heading)."""

    name: str
    title: str
    panels: tuple[tuple[str, str], ...]
    unit: str  # "ms" or "tokens/s"
    slo_bound: str | None


PICTURES = (
    Picture(
        "ttft",
        "Time to first token",
        (("median_ttft_ms", "median"), ("p99_ttft_ms", "99th percentile")),
        "ms",
        "ttft_ms",
    ),
    Picture(
        "time_per_output_token",
        "Time per output token",
        (("median_tpot_ms", "median"), ("p99_tpot_ms", "99th percentile")),
        "ms",
        "tpot_ms",
    ),
    Picture("output_throughput", "Output throughput", (("output_throughput", ""),), "tokens/s", None),
)

TRACE_PICTURES: tuple[tuple[str, str, Callable[..., Floats]], ...] = (
    ("ttft", "Time to first token", ttft_s),
    ("time_per_output_token", "Time per output token", tpot_s),
    ("e2el", "End-to-end latency", e2el_s),
)


def pictures(result: Result) -> dict[str, Figure]:
    """Return the figures of a result with at least one run, by the name of their file."""
    rows = [row for row in result.summary_rows if row["expert"] == ALL_EXPERTS]
    fleets = list(dict.fromkeys(row["fleet"] for row in rows))
    with mpl.rc_context(STYLE):
        if rows[0]["load_kind"] == "trace":
            return {name: _trace_figure(result, fleets, title, of) for name, title, of in TRACE_PICTURES}
        draw = _curves if len({_load(row) for row in rows}) > 1 else _comparison
        return {picture.name: draw(result, picture, rows, fleets) for picture in PICTURES}


def save_picture(figure: Figure, path: Path, form: str) -> None:
    """Write a figure as ``png`` or ``svg``, without the date and program version that would change the bytes."""
    with mpl.rc_context(STYLE):
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(path, format=form, dpi=150, metadata=metadata)


# ------------------------------------------------------------------------------------------------------ over loads


def _curves(result: Result, picture: Picture, rows: list[Row], fleets: list[str]) -> Figure:
    figure = _figure(11 if len(picture.panels) > 1 else 9.5, 5.2)
    axes = figure.subplots(1, len(picture.panels), sharey=True, squeeze=False)[0]
    for ax, (column, heading) in zip(axes, picture.panels, strict=True):
        for fleet, colour, marker in _styles(fleets):
            _line(ax, [row for row in rows if row["fleet"] == fleet], column, colour, marker)
        ax.set_title(heading, loc="left", color=GREY)
        _load_axis(ax, rows)
    scale, low, high = _value_range(picture, rows, result)
    axes[0].set_yscale(scale)
    axes[0].set_ylim(low, high)
    _value_ticks(axes[0].yaxis, picture.unit)
    axes[0].set_ylabel(picture.title.lower() if picture.unit == "ms" else "output tokens/s")
    for ax in axes:
        _slo_line(ax, picture, result)
    _label_lines(axes[-1], rows, picture.panels[-1][0], fleets)
    failures = any(row["failed"] for row in rows)
    _describe(figure, result, picture.title, "hollow points: some requests failed" if failures else None)
    return figure


def _line(ax: Axes, rows: list[Row], column: str, colour: str, marker: str) -> None:
    rows = sorted(rows, key=_load)
    loads = [_load(row) for row in rows]
    ax.plot(loads, [row[column] for row in rows], color=colour, zorder=3)
    for failed, face in ((False, colour), (True, "white")):
        points = [(load, row[column]) for load, row in zip(loads, rows, strict=True) if bool(row["failed"]) is failed]
        ax.plot(*zip(*points, strict=True) if points else ([], []), marker, color=colour, mfc=face, zorder=4)
    low = np.array([row[f"{column}_low"] for row in rows])
    high = np.array([row[f"{column}_high"] for row in rows])
    # An interval of few replications may reach below zero, where no latency or throughput is.
    ax.fill_between(loads, np.maximum(low, 1e-3), high, color=colour, alpha=0.18, linewidth=0, zorder=2)


def _load_axis(ax: Axes, rows: list[Row]) -> None:
    loads = sorted({_load(row) for row in rows})
    ax.set_xscale("log")
    if loads[-1] / loads[0] < 10:
        ax.xaxis.set_major_locator(FixedLocator(loads))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xlim(loads[0] / 1.3, loads[-1] * 1.3)
        _log_ticks(ax.xaxis)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda load, _: f"{load:,.10g}"))
    ax.xaxis.set_tick_params(which="minor", length=0)
    ax.set_xlabel("concurrent users" if rows[0]["load_kind"] == "closed_loop" else "offered load, requests/s")


def _label_lines(ax: Axes, rows: list[Row], column: str, fleets: list[str]) -> None:
    """Write each fleet's name at the end of its line, moved apart where the ends are close."""
    ends = []
    for fleet, colour, _ in _styles(fleets):
        known = [(_load(row), row[column]) for row in rows if row["fleet"] == fleet and row[column] == row[column]]
        if known:
            ends.append((fleet, colour, max(known)))
    last_load = max((_load(row) for row in rows), default=1.0)
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [float(to_axes.transform((last_load, value))[1]) for _, _, (_, value) in ends]
    for (fleet, colour, end), height in zip(ends, spread(heights, LABEL_GAP), strict=True):
        ax.annotate(
            fleet,
            xy=end,
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "alpha": 0.7},
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """Move heights in [0, 1] as little as needed to be at least ``gap`` apart, order kept."""
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    # Free of the gaps the problem is an isotonic regression: pool neighbours that are out of order.
    blocks: list[list[float]] = []
    for value in np.asarray(heights)[order] - steps:
        blocks.append([float(value)])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks]) if blocks else steps
    moved = np.empty(len(heights))
    moved[order] = np.clip(level, 0, max(0.0, 1 - gap * (len(heights) - 1))) + steps
    return [float(height) for height in moved]


# ----------------------------------------------------------------------------------------------------- a single load


def _comparison(result: Result, picture: Picture, rows: list[Row], fleets: list[str]) -> Figure:
    figure = _figure(9.5, 1.9 + 0.5 * len(fleets))
    ax = figure.subplots()
    for place, (fleet, colour, _) in enumerate(_styles(fleets)):
        row = next(row for row in rows if row["fleet"] == fleet)
        if picture.unit == "ms":
            ax.plot([row[column] for column, _ in picture.panels], [place] * 2, color=colour, alpha=0.35, linewidth=3)
        else:
            ax.barh(place, row[picture.panels[0][0]], color=colour, alpha=0.35, height=0.5)
        # The lower figure's text ends at its point and the higher one's begins there, so they cannot overlap.
        looks = (("o", colour, "right"), ("D", "white", "left")) if picture.unit == "ms" else (("|", colour, "left"),)
        for (column, _), (marker, face, align) in zip(picture.panels, looks, strict=True):
            spread = np.array(_error(row, column))[:, None]
            ax.errorbar(row[column], place, xerr=spread, fmt=marker, color=colour, mfc=face, capsize=3, ms=7)
            text = _value_text(row[column], picture.unit)
            point = (row[column], place)
            ax.annotate(text, point, (0, 8), textcoords="offset points", ha=align, fontsize=8, color=GREY)
    scale, low, high = _value_range(picture, rows, result)
    ax.set_xscale(scale)
    ax.set_xlim(low, high)
    _value_ticks(ax.xaxis, picture.unit)
    bound_ms = _bound_ms(picture, result)
    if bound_ms is not None and bound_ms < high:
        ax.axvline(bound_ms, color=GREY, linestyle=(0, (1, 2)))
        above = ("data", "axes fraction")
        ax.annotate(f"SLO {_value_text(bound_ms, 'ms')}", (bound_ms, 1.01), xycoords=above, color=GREY, fontsize=8)
    ax.set_yticks(range(len(fleets)), fleets)
    ax.set_ylim(len(fleets) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(
        f"{picture.title.lower()}: circle median, diamond 99th percentile"
        if picture.unit == "ms"
        else "output tokens/s"
    )
    where = loads_label(rows[0]["load_kind"], [_load(rows[0])])
    _describe(figure, result, f"{picture.title} at {where}", None)
    return figure


def _error(row: Row, column: str) -> tuple[float, float]:
    """Distances from the mean to its confidence bounds; none for a single replication."""
    low, high = row[column] - row[f"{column}_low"], row[f"{column}_high"] - row[column]
    return (0.0, 0.0) if low != low else (low, high)


# ----------------------------------------------------------------------------------------------------------- a trace


def _trace_figure(result: Result, fleets: list[str], title: str, of: Callable[..., Floats]) -> Figure:
    """Share of requests below each time: a panel a fleet, a line an expert, replications pooled."""
    figure = _figure(9.5, 1.2 + 3.4 * len(fleets))
    axes = figure.subplots(len(fleets), 1, sharex=True, squeeze=False)[:, 0]
    shares = np.linspace(0, 1, 401)
    for ax, fleet in zip(axes, fleets, strict=True):
        runs = [run for run in result.runs if run.fleet == fleet]
        done = [completed_in_window(run) for run in runs]
        values_s = np.concatenate([of(run.requests)[mask] for run, mask in zip(runs, done, strict=True)])
        expert_of = np.concatenate([run.requests["expert_index"][mask] for run, mask in zip(runs, done, strict=True)])
        names = runs[0].expert_names
        groups = {name: values_s[expert_of == index] for index, name in enumerate(names)} if len(names) > 1 else {}
        for place, (name, group_s) in enumerate(groups.items()):
            # More lines than colours are a texture: one grey and one entry in the legend for all of them.
            many = len(groups) > len(TRACE_COLOURS)
            label = ("each expert" if place == 0 else "_") if many else name
            _share_line(ax, group_s, shares, label, GREY if many else TRACE_COLOURS[place], 0.7 if many else 1.4)
        _share_line(ax, values_s, shares, "all requests", "#000000", 2.6)
        ax.set_xscale("log")
        _value_ticks(ax.xaxis, "ms")
        ax.set_ylim(0, 1.01)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        ax.set_ylabel("share of requests")
        ax.set_title(fleet, loc="left", color=GREY)
        if ax.lines:
            ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    axes[-1].set_xlabel(title.lower())
    _describe(figure, result, f"{title}, trace replay", None)
    return figure


def _share_line(ax: Axes, values_s: Floats, shares: Floats, name: str, colour: str, width: float) -> None:
    known = values_s[~np.isnan(values_s)]
    if len(known):
        ax.plot(np.quantile(known, shares) * 1e3, shares, color=colour, linewidth=width, label=name)


# ------------------------------------------------------------------------------------------------- shared by pictures


def _figure(width_in: float, height_in: float) -> Figure:
    return Figure(figsize=(width_in, height_in), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))


def _styles(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each name with its colour and marker."""
    return [(name, COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place, name in enumerate(names)]


def _load(row: Row) -> float:
    return float(row["rate_rps"] if row["load_kind"] == "open_loop" else row["users"])


def _bound_ms(picture: Picture, result: Result) -> float | None:
    slo = result.file.slo
    return None if slo is None or picture.slo_bound is None else getattr(slo, picture.slo_bound)


def _value_range(picture: Picture, rows: list[Row], result: Result) -> tuple[str, float, float]:
    """Scale and limits of the axis of values: logarithmic for latencies far apart, otherwise linear from zero."""
    columns = [column for column, _ in picture.panels]
    values = [row[column] for row in rows for column in columns if row[column] > 0]
    bound_ms = _bound_ms(picture, result)
    if bound_ms is not None and bound_ms < SLO_IN_SIGHT * max(values, default=0):
        values.append(bound_ms)
    low, high = min(values, default=1.0), max(values, default=1.0)
    # A band may reach far above the points; then the points decide what is seen.
    top = max([high, *(row[f"{name}_high"] for row in rows for name in columns if row[f"{name}_high"] < 1.4 * high)])
    if picture.unit == "ms" and high / low > LINEAR_UP_TO:
        return "log", low / 1.4, top * 1.4
    return "linear", 0, top * 1.08


def _slo_line(ax: Axes, picture: Picture, result: Result) -> None:
    bound_ms = _bound_ms(picture, result)
    if bound_ms is None:
        return
    text = f"SLO {_value_text(bound_ms, 'ms')}"
    if bound_ms > ax.get_ylim()[1]:
        ax.annotate(f"{text}, above this range", (0.01, 0.97), xycoords="axes fraction", color=GREY, fontsize=8)
        return
    ax.axhline(bound_ms, color=GREY, linestyle=(0, (1, 2)), zorder=1)
    left = ("axes fraction", "data")
    ax.annotate(text, (0.01, bound_ms), (0, 3), left, "offset points", color=GREY, fontsize=8)


def _value_ticks(axis: Axis, unit: str) -> None:
    if axis.get_scale() == "log":
        _log_ticks(axis)
    axis.set_major_formatter(_value_formatter(unit))


def _log_ticks(axis: Axis) -> None:
    """Label decades, and 2 and 5 within them when the axis spans less than two."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=20))
    axis.set_minor_formatter(NullFormatter())


def _value_text(value: float, unit: str) -> str:
    """Three significant digits; milliseconds from one second on are written as seconds."""
    if unit == "ms":
        return f"{value / 1e3:,.3g} s" if value >= 1e3 else f"{value:.3g} ms"
    return f"{value:,.0f}"


def _value_formatter(unit: str) -> FuncFormatter:
    return FuncFormatter(lambda value, _: "0" if value == 0 else _value_text(value, unit))


def _source(result: Result) -> str:
    """Where times come from, short enough for a title: by name if there is one source, else by kind."""
    labels = result.curve_labels
    if len(labels) == 1:
        return labels[0]
    plain = [label for label in labels if label.startswith("roofline")]
    profiles = len(labels) - len(plain)
    kinds = [f"{profiles} calibrated profiles" if profiles > 1 else "a calibrated profile"] if profiles else []
    return " and ".join([*kinds, *plain])


def _describe(figure: Figure, result: Result, title: str, legend: str | None) -> None:
    """Title with the curves' labels; below, what the reader must know about lines, bands and origin."""
    figure.suptitle(f"{title} ({_source(result)})", x=0.01, ha="left", fontweight="bold")
    replications = len({run.replication for run in result.runs})
    bands = f"means of {replications} replications with 95 % confidence" if replications > 1 else "one replication"
    kind = "simulated" if result.measured is None else "measured"
    parts = [result.file.name, kind, bands, legend, f"expert-router {result.version}"]
    if result.interrupted:
        parts.insert(0, "interrupted, some points are missing")
    figure.supxlabel(" · ".join(part for part in parts if part), x=0.01, ha="left", fontsize=8, color=GREY)
