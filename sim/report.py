"""The result on a terminal: a table of fleets, a table of experts at the highest load, and what to know about both."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sim.metrics import COUNTS, Row
from sim.result import Measured, Result, loads_label
from sim.spec import ALL_EXPERTS

PIPED_WIDTH = 160
NAME_WIDTH = 26
EXPERTS_SHOWN = 10
GAP = 2  # blanks between two columns of a table: one of padding and one of the box
EDGES = 2  # blanks of the box left and right of a table
BOX = box.SIMPLE_HEAD


class Column(NamedTuple):
    """A column of figures.

    Attributes:
        heading: two lines, the second the unit or the percentile.
        metric: the summary's column.
        rank: 1 is kept on the narrowest terminal, higher ones are left out first.
        bounded: whether the half-width of the confidence interval is written beside it when there is room.
        scale: from the summary's unit to the one shown.
    """

    heading: str
    metric: str
    rank: int
    bounded: bool = False
    scale: float = 1.0


def number_text(value: float, digits: int = 3) -> str:
    """Write a figure with ``digits`` significant digits or all before the point: ``0.0123``, ``4.57``, ``12,346``.

    NaN, which is unknown, is a dash.
    """
    if value != value:
        return "-"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".removesuffix(".")


def count_text(value: float) -> str:
    """Write a count or a load, which is exact: ``1,000``, ``2.5``."""
    return "-" if value != value else f"{value:,.10g}"


FLEET_COLUMNS = (
    Column("req/s", "request_throughput", 4, bounded=True),
    Column("tokens/s\nout", "output_throughput", 1, bounded=True),
    Column("TTFT ms\np50", "median_ttft_ms", 1, bounded=True),
    Column("TTFT ms\np99", "p99_ttft_ms", 1, bounded=True),
    Column("TPOT ms\np50", "median_tpot_ms", 1, bounded=True),
    Column("TPOT ms\np99", "p99_tpot_ms", 3, bounded=True),
    Column("E2E s\np99", "p99_e2el_ms", 2, bounded=True, scale=1e-3),
    Column("goodput\nreq/s", "request_goodput", 5),
    Column("in SLO\n%", "good_share", 2, scale=100),
    Column("busy\n%", "utilization", 2, scale=100),
    Column("failed", "failed", 1),
    Column("GPUs", "gpus", 4),
    Column("$ per M\ntokens", "cost_per_million_output_tokens", 3),
)
EXPERT_COLUMNS = (
    Column("req/s", "request_throughput", 2),
    Column("tokens/s\nout", "output_throughput", 1),
    Column("TTFT ms\np50", "median_ttft_ms", 3),
    Column("TTFT ms\np99", "p99_ttft_ms", 1),
    Column("TPOT ms\np50", "median_tpot_ms", 1),
    Column("TPOT ms\np99", "p99_tpot_ms", 4),
    Column("queue ms\nmean", "mean_engine_queue_ms", 3),
    Column("batch\nmean", "batch_size", 2),
    Column("KV %\nmean", "kv_usage", 4, scale=100),
    Column("KV %\nmax", "kv_usage_max", 2, scale=100),
    Column("pre-\nempted", "preemptions", 4),
    Column("busy\n%", "utilization", 1, scale=100),
    Column("front\nend %", "front_end_utilization", 2, scale=100),
    Column("failed", "failed", 1),
    Column("GPUs", "gpus", 5),
)

MAX_LISTED_EXPERTS = 4


def print_report(result: Result, console: Console | None = None) -> None:
    """Print the report to ``console``; by default to stdout, wide when that is not a terminal."""
    console = wide_console() if console is None else console
    for part in report(result, console.width):
        console.print(part)


def wide_console() -> Console:
    """Return a console on stdout that is wide when that is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def report(result: Result, width: int) -> list[RenderableType]:
    """Return the parts of the report, tables made to fit ``width`` columns by leaving out the less telling figures."""
    if not result.runs:
        return [Text(line) for line in result.notes] or [Text("no run finished")]
    rows = result.summary_rows
    parts: list[RenderableType] = [_fleet_table(result, [r for r in rows if r["expert"] == ALL_EXPERTS], width)]
    experts = [row for row in _at_highest_load(rows) if row["expert"] != ALL_EXPERTS]
    parts.append(_expert_table(experts, width))
    parts += [Padding(Text(line), (0, 0, 0, 2)) for line in _remarks(result)]
    return parts


def _fleet_table(result: Result, rows: list[Row], width: int) -> Table:
    load, heading = {
        "closed_loop": ("users", "users"),
        "open_loop": ("rate_rps", "offered\nreq/s"),
        "trace": ("users", "load"),
    }[rows[0]["load_kind"]]
    labels = {
        "fleet": [row["fleet"] for row in rows],
        heading: ["trace" if heading == "load" else count_text(row[load]) for row in rows],
    }
    columns = [column for column in FLEET_COLUMNS if _tells(column, rows)]
    return _table(f"{result.file.name}: fleets", labels, columns, rows, width)


def _expert_table(rows: list[Row], width: int) -> Table:
    shown: list[Row] = []
    for fleet in dict.fromkeys(row["fleet"] for row in rows):
        experts = [row for row in rows if row["fleet"] == fleet]
        busiest = sorted(experts, key=lambda row: -row["utilization"])[:EXPERTS_SHOWN]
        shown += [row for row in experts if any(row is each for each in busiest)]
    kind = rows[0]["load_kind"]
    loads = loads_label(kind, [row["rate_rps"] if kind == "open_loop" else row["users"] for row in rows])
    title = f"experts, {loads}" if kind == "trace" else f"experts at {loads}"
    if len(shown) < len(rows):
        title += f" (the {EXPERTS_SHOWN} busiest of each fleet; summary.csv has all {len(rows)})"
    labels = {"fleet": [row["fleet"] for row in shown], "expert": [row["expert"] for row in shown]}
    return _table(title, labels, [column for column in EXPERT_COLUMNS if _tells(column, shown)], shown, width)


def _table(title: str, labels: dict[str, list[str]], columns: Sequence[Column], rows: list[Row], width: int) -> Table:
    """Build a table of labels and figures with the columns that fit, and with half-widths when then all of them fit."""
    room = width - EDGES - sum(min(NAME_WIDTH, _width(heading, cells)) + GAP for heading, cells in labels.items())
    chosen = {column: [_cell(column, row, bounds=True) for row in rows] for column in columns}
    if sum(_width(column.heading, cells) + GAP for column, cells in chosen.items()) > room:
        chosen = {column: [_cell(column, row, bounds=False) for row in rows] for column in columns}
    for column in sorted(columns, key=lambda column: -column.rank):
        if column.rank > 1 and sum(_width(each.heading, cells) + GAP for each, cells in chosen.items()) > room:
            del chosen[column]
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=BOX, padding=(0, GAP - 1, 0, 0))
    for heading in labels:
        justify: JustifyMethod = "left" if heading in ("fleet", "expert") else "right"
        table.add_column(heading, max_width=NAME_WIDTH, overflow="fold", justify=justify, vertical="bottom")
    for column in chosen:
        table.add_column(column.heading, justify="right", no_wrap=True, vertical="bottom")
    names = list(labels.values())
    for place in range(len(rows)):
        repeated = place > 0 and names[0][place] == names[0][place - 1]
        if place > 0 and not repeated:
            table.add_section()
        words = ["" if repeated else names[0][place], *(cells[place] for cells in names[1:])]
        table.add_row(*map(Text, words), *(cells[place] for cells in chosen.values()))
    return table


def _cell(column: Column, row: Row, *, bounds: bool) -> str:
    if column.metric in (*COUNTS, "gpus"):
        return count_text(row[column.metric])
    value = number_text(row[column.metric] * column.scale)
    if not bounds or not column.bounded:
        return value
    half = (row[f"{column.metric}_high"] - row[f"{column.metric}_low"]) / 2
    return value if half != half else f"{value} ±{number_text(half * column.scale, 2)}"


def _width(heading: str, cells: list[str]) -> int:
    return max(map(len, [*heading.split("\n"), *cells]))


def _tells(column: Column, rows: list[Row]) -> bool:
    """Whether a column says anything: some figure is known, and failures only when there are any."""
    if column.metric in ("failed", "preemptions"):
        return any(row[column.metric] > 0 for row in rows)
    return any(row[column.metric] == row[column.metric] for row in rows)


def _at_highest_load(rows: list[Row]) -> list[Row]:
    """The rows of the highest load that each fleet finished, its only one for a trace."""

    def load(row: Row) -> float:
        return float(row["rate_rps"] if row["load_kind"] == "open_loop" else row["users"])

    highest: dict[str, float] = {}
    for row in rows:
        highest[row["fleet"]] = max(load(row), highest.get(row["fleet"], load(row)))
    return [row for row in rows if row["load_kind"] == "trace" or load(row) == highest[row["fleet"]]]


def _listed(users: list[str]) -> str:
    """Name the first experts, and how many more there are."""
    more = len(users) - MAX_LISTED_EXPERTS
    return ", ".join(users[:MAX_LISTED_EXPERTS]) + (f" and {more} more" if more > 0 else "")


def _measured_remarks(result: Result, measured: Measured) -> list[str]:
    """Where a real run took place, and how well its load client kept up at each fleet's highest load."""
    remarks = []
    for fleet, url in measured.urls.items():
        engines: dict[str, list[str]] = {}
        for expert, engine in measured.engines[fleet].items():
            engines.setdefault(engine, []).append(expert)
        of = "; ".join(f"{_listed(experts)}: {engine}" for engine, experts in engines.items())
        remarks.append(f"Measured: {fleet} at {url}, started {measured.started}. {of}.")
        runs = [run for run in result.runs if run.fleet == fleet]
        if runs and "load client" in runs[-1].checks:
            load = loads_label(runs[-1].load_kind, [runs[-1].load])
            remarks.append(f"Load client of {fleet} at {load}: {runs[-1].checks['load client']}.")
    return remarks


def _remarks(result: Result) -> list[str]:
    """What stands below the tables: where times come from, what was counted, and the notes of the runs."""
    remarks = []
    using: dict[str, list[str]] = {}
    details: dict[str, set[str]] = {}
    for fleet, experts in result.curves.items():
        for name, source in experts.items():
            using.setdefault(source.label, []).append(f"{fleet}/{name}")
            details.setdefault(source.label, set()).add(source.detail)
    if result.measured is not None:
        remarks += _measured_remarks(result, result.measured)
        using = {}
    for label, users in using.items():
        whose = "all experts" if len(using) == 1 else _listed(users)
        several = len(details[label]) > 1
        detail = "each expert's source is in fleet.resolved.yaml (--out)" if several else next(iter(details[label]))
        remarks.append(f"Iteration times of {whose}: {label}; {detail}.")
    total = [row for row in result.summary_rows if row["expert"] == ALL_EXPERTS]
    counts = {
        name: sum(row[name] for row in total) for name in ("sent", "completed", "failed", "in_flight", "measured")
    }
    remarks.append(
        "Requests: {sent:,} sent, {completed:,} completed, {failed:,} failed, {in_flight:,} in flight when their run"
        " ended; latencies are of the {measured:,} completed after the warm-up.".format(**counts)
    )
    replications = max(row["replications"] for row in total)
    if replications > 1:
        remarks.append(
            f"Figures are means over {replications} replications; 95 % confidence (±) is shown where there is room, and"
            " its bounds are in summary.csv."
        )
    return remarks + [f"Note: {note}" for note in result.notes]
