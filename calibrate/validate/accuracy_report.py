"""``accuracy.md``: how far predictions are from measurements, as tables and a picture."""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from calibrate.tables.contradictions import RULE, contradictions, doubtful_runs
from calibrate.tables.csv_table import TableError
from calibrate.tables.measured_runs import METRICS
from calibrate.tables.run_engine import gpu_of_run
from calibrate.validate.error_tables import (
    GROUPINGS,
    KEY_METRICS,
    ErrorSummary,
    mean_and_median,
    shown_pct,
    skipped_by_reason,
    summaries,
    summary,
)
from calibrate.validate.replay import REGIME_RULES, REGIMES
from calibrate.validate.validate import COVERAGE, ErrorRow, Validation
from sim.plots import COLOURS, GREY, MARKERS, STYLE, save_picture
from sim.profile import ASSUMED_ERROR_GROWTH

MOST_VERDICTS = 2
"""Lines quoted from each page of a real check."""
PICTURE = "accuracy.png"
BAND = 0.1
WORST_SHOWN = 8
FEWEST_PEER_RUNS = 10

TITLES = {
    "ttft_mean": "TTFT, mean, s",
    "tpot_mean": "TPOT, mean, s",
    "e2e_mean": "end-to-end latency, mean, s",
    "e2e_p99": "end-to-end latency, 99th percentile, s",
    "itl_p50": "ITL, median, s",
    "output_throughput": "output throughput, tokens/s",
}


class PeerFigure(NamedTuple):
    """The best published error of another simulator on one metric."""

    simulator: str
    mean_pct: float
    median_pct: float
    runs: int
    source: str


def write_accuracy_report(validation: Validation, folder: Path, *, command: str, peers: Path | None) -> list[Path]:
    """Write ``accuracy.md`` and its picture into a folder; return their paths.

    Args:
        validation: outcome of ``calibrate.validate.validate.validate``.
        folder: made when it does not exist.
        command: the line that makes the report again.
        peers: errors of other simulators (``peer_accuracy.csv``), or None.

    Raises:
        TableError: ``peers`` cannot be read.
    """
    peer_figures = {} if peers is None else read_peer_figures(peers)
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "accuracy.md", folder / PICTURE
    save_picture(predicted_against_measured(validation), picture, "png")
    parts = _page(validation, command, peer_figures, checked_for_real(folder))
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [page, picture]


def read_peer_figures(path: Path) -> dict[str, PeerFigure]:
    """Return for each metric the simulator with the lowest mean error on dense models, one point per experiment.

    Simulators that were fitted on the very runs, or scored on fewer than ten, are passed over.

    Raises:
        TableError: the file cannot be read or lacks a column.
    """
    best: dict[str, PeerFigure] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if (row["subset"], row["level"], row["trained_on_these"]) != ("dense", "summary", "False"):
                    continue
                metric = row["metric"].removesuffix("_corrected")
                found = PeerFigure(
                    row["simulator"],
                    float(row["mape_mean_pct"]),
                    float(row["mape_median_pct"]),
                    int(row["n_points"]),
                    row["source_file"],
                )
                # TPOT of the published records counts tokens wrongly; only the corrected comparison is fair.
                if metric not in METRICS or (metric.startswith("tpot") and metric == row["metric"]):
                    continue
                if found.runs >= FEWEST_PEER_RUNS and (metric not in best or found.mean_pct < best[metric].mean_pct):
                    best[metric] = found
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise TableError(f"{path}: not a table of peers' errors: {error!r}") from error
    return best


# ------------------------------------------------------------------------------------------------------------ the page


def _page(
    validation: Validation, command: str, peers: Mapping[str, PeerFigure], checks: Iterable[str]
) -> Iterable[str]:
    rows = validation.predicted_rows
    runs = {row.run_id for row in rows}
    yield "# How far predictions are from measurements"
    yield (
        f"{len(runs)} of {len(validation.runs)} measured runs, simulated again under the load they had. Errors "
        "are absolute, in percent of the measured value, unless called bias (predicted minus "
        f"measured). Made by\n\n    {command}"
    )
    yield _in_sample(rows)
    architectures = summaries(validation, GROUPINGS["architecture"])
    for name in ("dense", "mixture"):
        if name in architectures:
            yield f"## {name.capitalize()} models"
            yield _metric_table(architectures[name], peers if name == "dense" else {})
    if peers:
        yield _peer_text(peers)
    yield (
        f"The {COVERAGE:.0%} intervals are split-conformal: a prediction times and over the factor that holds the "
        "errors of the same metric in at least that share of the *other* experiments of its kind (dense, mixture), "
        "each weighted alike. None is given where there are fewer than nine others. Where a run goes beyond the "
        "batches, KV reads or chunks that its fit had seen, its interval is wider: with the largest of the three `d` "
        f"doublings beyond, the logarithm of the factor is `1 + {ASSUMED_ERROR_GROWTH:g} d` times that inside, and "
        "errors are compared in these units."
    )
    yield f"![Predicted against measured]({PICTURE})"
    yield (
        f"Points are runs, the band is {BAND:.0%} either side of the measured value. The output throughput of an open "
        "loop is the offered one as long as the engine keeps up, so its error says little."
    )
    yield from checks
    for heading in ("model", "GPU", "source"):
        yield f"## By {heading}"
        yield _group_table(heading, summaries(validation, GROUPINGS[heading]))
    yield "## By load regime"
    yield REGIME_RULES
    for regime in REGIMES:
        chosen = [row for row in rows if row.regime == regime]
        if chosen:
            yield f"### {regime.capitalize()}"
            yield _metric_table(_by_metric(chosen), {})
            yield f"Largest errors of {', '.join(KEY_METRICS)}:"
            yield _worst(chosen)
    doubtful = set(doubtful_runs(validation.runs.values())) & runs
    if doubtful:
        yield "## Runs that contradict others"
        yield _contradictions_text(validation, doubtful)
        yield _without_table(rows, doubtful)
    yield "## Not simulated"
    yield (
        "\n".join(
            f"- {len(run_ids)}: {reason} ({run_ids[0]}{', ...' if len(run_ids) > 1 else ''})"
            for reason, run_ids in skipped_by_reason(validation)
        )
        or "None."
    )
    yield "## Assumed beyond the tables"
    yield "What a row does not say and the replay needs, with the number of runs it was assumed for:"
    yield _assumptions(rows)


def checked_for_real(folder: Path) -> list[str]:
    """Return a section on the pages ``check-*.md`` beside the report: real fleets, run and predicted; none without."""
    lines = []
    for page in sorted(folder.glob("check-*.md")):
        title, made, *rest = (part for part in page.read_text(encoding="utf-8").split("\n\n") if part.strip())
        verdicts = next((part.splitlines() for part in rest if part.startswith("- ")), [])
        lines.append(f"- [{title.lstrip('# ')}]({page.name}). {made.strip().removesuffix(' by')}")
        lines += [f"  {line}" for line in verdicts if line.startswith("- ")][:MOST_VERDICTS]
    return ["## Checked for real", "Whole fleets, predicted and then run:", "\n".join(lines)] if lines else []


def _in_sample(rows: Sequence[ErrorRow]) -> str:
    profiles = {row.profile for row in rows}
    if all(profile.startswith("fit without") for profile in profiles):
        how = (
            "Each experiment (all loads of one server) is predicted by a fit to all the others: no fitted parameter "
            "has seen it. The packaged front-end costs, which the fit keeps but for the delay, were set on a few "
            "of the runs (`sim/data/roofline.json` says which)."
        )
    elif profiles == {"roofline"}:
        how = (
            "The roofline predicts: kernel efficiencies are from operator times, not from these runs. Its host "
            "overheads and front-end costs were set on runs of this kind (`sim/data/roofline.json` says which), so "
            "they are in part in-sample."
        )
    else:
        how = "Profiles predict. A run that a profile was fitted on, by its provenance, is in-sample."
    return (
        f"{how} Lengths assumed for saturated runs (last section) were inferred from a few of them and are in-sample, "
        "and so is part of the memory model, where KV blocks are not recorded."
    )


def _metric_table(by_metric: Mapping[str, ErrorSummary], peers: Mapping[str, PeerFigure]) -> str:
    headings = ["metric", "runs", "mean", "median", "p90", "bias", f"in {COVERAGE:.0%} interval"]
    lines = []
    for metric, found in by_metric.items():
        cells = [metric, str(found.runs)]
        cells += [shown_pct(value) for value in (found.mean_pct, found.median_pct, found.p90_pct, found.bias_pct)]
        cells.append(f"{100 * found.covered:.0f} %" if isfinite(found.covered) else "")
        if peers:
            peer = peers.get(metric)
            cells.append("" if peer is None else f"{peer.mean_pct:.1f} / {peer.median_pct:.1f} ({peer.simulator})")
        lines.append(cells)
    return _table([*headings, "best other: mean / median"] if peers else headings, lines)


def _peer_text(peers: Mapping[str, PeerFigure]) -> str:
    sources = ", ".join(sorted({peer.source for peer in peers.values()}))
    counts = sorted({peer.runs for peer in peers.values()})
    runs = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        "The last column is the simulator with the lowest mean error on that metric among those that published "
        f"predictions of such runs and were not fitted on them: dense models, {runs} experiments, another "
        f"split of the same measurements and one point per experiment, so the comparison is not run by run. Computed "
        f"from {sources}."
    )


def _group_table(heading: str, groups: Mapping[str, Mapping[str, ErrorSummary]]) -> str:
    present = [metric for metric in KEY_METRICS if any(metric in by_metric for by_metric in groups.values())]
    lines = [
        [name, str(max(found.runs for found in by_metric.values()))]
        + [mean_and_median(by_metric.get(metric)) for metric in present]
        for name, by_metric in groups.items()
    ]
    return "Mean / median error.\n\n" + _table([heading, "runs", *present], lines)


def _contradictions_text(validation: Validation, doubtful: Collection[str]) -> str:
    pairs = [each for each in contradictions(validation.runs.values()) if each.slower in doubtful]
    listed = "\n".join(f"- {each.slower}: {each.ratio:.1f} times {each.faster}" for each in pairs)
    return (
        f"{RULE} By the measurements alone, no prediction is involved. {len(pairs)} runs do, and with their series "
        f"{len(doubtful)} are doubted. They are in all tables above.\n\n{listed}\n\nErrors of all runs, with and "
        "without the doubted ones, mean / median:"
    )


def _without_table(rows: Sequence[ErrorRow], doubtful: Collection[str]) -> str:
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows if row.run_id in doubtful):
        every = [row for row in rows if row.metric == metric]
        left = [row for row in every if row.run_id not in doubtful]
        lines.append(
            [metric, f"{len(every)}", mean_and_median(summary(every)), f"{len(left)}", mean_and_median(summary(left))]
        )
    return _table(["metric", "runs", "all", "runs", "without the doubted"], lines)


def _worst(rows: Sequence[ErrorRow]) -> str:
    known = [row for row in rows if row.metric in KEY_METRICS and isfinite(row.ape_pct)]
    known.sort(key=lambda row: -row.ape_pct)
    lines = [
        [row.run_id, row.metric, f"{100 * (row.predicted / row.measured - 1):+.0f} %"] for row in known[:WORST_SHOWN]
    ]
    return _table(["run", "metric", "error"], lines)


def _assumptions(rows: Sequence[ErrorRow]) -> str:
    counts: dict[str, set[str]] = {}
    for row in rows:
        for note in row.note.split("; "):
            if note:
                counts.setdefault(_without_numbers_of_one_run(note), set()).add(row.run_id)
    return "\n".join(
        f"- {len(found)}: {note}" for note, found in sorted(counts.items(), key=lambda item: -len(item[1]))
    )


def _without_numbers_of_one_run(note: str) -> str:
    """Return a note without the leading count that differs from run to run."""
    first, _, rest = note.partition(" ")
    if first.isdigit() and rest.startswith(("KV blocks", "requests without")):
        return rest
    return "requests arrive faster than all slots serve them" if note.startswith("requests arrive faster") else note


def _by_metric(rows: Sequence[ErrorRow]) -> dict[str, ErrorSummary]:
    found = {metric: [row for row in rows if row.metric == metric] for metric in METRICS}
    return {metric: summary(of_metric) for metric, of_metric in found.items() if of_metric}


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines))


# --------------------------------------------------------------------------------------------------------- the picture


def predicted_against_measured(validation: Validation) -> Figure:
    """Return one panel per metric that was measured, logarithmic on both axes, a colour for each GPU."""
    rows = [row for row in validation.predicted_rows if isfinite(row.ape_pct) and row.predicted > 0]
    gpu_of = {row.run_id: gpu_of_run(validation.runs[row.run_id]).name for row in rows}
    gpus = sorted({gpu_of[row.run_id] for row in rows})
    metrics = [metric for metric in KEY_METRICS if any(row.metric == metric for row in rows)]
    columns = min(3, len(metrics)) or 1
    lines = -(-len(metrics) // columns) or 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * columns, 3.7 * lines + 0.5), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for ax, metric in zip(axes, metrics, strict=False):
            _panel(ax, [row for row in rows if row.metric == metric], gpu_of, gpus)
            ax.set_title(TITLES[metric], loc="left")
        for ax in list(figure.axes)[len(metrics) :]:
            ax.remove()
        handles = [
            mpl.lines.Line2D([], [], linestyle="", marker=_marker(i), color=_colour(i), label=gpu)
            for i, gpu in enumerate(gpus)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(gpus)), frameon=False)
        figure.supxlabel("measured", color=GREY)
        figure.supylabel("predicted", color=GREY)
    return figure


def _panel(ax: Axes, rows: Sequence[ErrorRow], gpu_of: Mapping[str, str], gpus: Sequence[str]) -> None:
    values = [value for row in rows for value in (row.measured, row.predicted)]
    low, high = min(values) / 1.25, max(values) * 1.25
    ends = [low, high]
    ax.fill_between(
        ends, [v * (1 - BAND) for v in ends], [v * (1 + BAND) for v in ends], color=GREY, alpha=0.15, linewidth=0
    )
    ax.plot(ends, ends, color=GREY, linewidth=0.8)
    for index, gpu in enumerate(gpus):
        chosen = [row for row in rows if gpu_of[row.run_id] == gpu]
        ax.plot(
            [row.measured for row in chosen],
            [row.predicted for row in chosen],
            linestyle="",
            marker=_marker(index),
            color=_colour(index),
            alpha=0.75,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        wide = high / low > 50
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]
