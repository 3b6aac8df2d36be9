"""The errors of a validation on a terminal."""

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibrate.tables.contradictions import doubtful_runs
from calibrate.validate.error_tables import (
    GROUPINGS,
    KEY_METRICS,
    ErrorSummary,
    common_start,
    mean_and_median,
    shown_pct,
    skipped_by_reason,
    summaries,
    summary,
)
from calibrate.validate.validate import COVERAGE, Validation

SHOWN_GROUPINGS = ("model", "GPU", "regime")


def print_validation(validation: Validation, console: Console) -> None:
    """Print the errors by metric, model, GPU and regime, and what was not simulated."""
    rows = validation.predicted_rows
    if rows:
        profiles = sorted({row.profile for row in rows})
        runs = len({row.run_id for row in rows})
        console.print(f"{runs} run{'s' if runs > 1 else ''} predicted by {common_start(profiles)}", highlight=False)
        console.print(_metrics_table(summaries(validation)["all"]))
        for name in SHOWN_GROUPINGS:
            console.print(_group_table(name, summaries(validation, GROUPINGS[name])))
    doubtful = set(doubtful_runs(validation.runs.values())) & {row.run_id for row in rows}
    if doubtful:
        left = [row for row in rows if row.run_id not in doubtful]
        names = common_start(sorted(doubtful))
        console.print(f"{len(doubtful)} runs contradict others of the table: {names}", highlight=False)
        for metric in sorted({row.metric for row in rows if row.run_id in doubtful}):
            every, without = ([row for row in some if row.metric == metric] for some in (rows, left))
            console.print(
                f"  {metric}: {mean_and_median(summary(every))} %, without them {mean_and_median(summary(without))} %",
                highlight=False,
            )
    if validation.skipped:
        console.print(f"not simulated, {len(validation.skipped)} of {len(validation.runs)} runs:", highlight=False)
        for reason, run_ids in skipped_by_reason(validation):
            console.print(
                Text(f"  {len(run_ids):4}  {reason}: {common_start(run_ids)}"), highlight=False, soft_wrap=True
            )


def _metrics_table(by_metric: Mapping[str, ErrorSummary]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="absolute error, %", title_justify="left")
    table.add_column("metric")
    for heading in ("runs", "mean", "median", "p90", "bias", f"in {COVERAGE:.0%}\ninterval, %"):
        table.add_column(heading, justify="right")
    for metric, found in by_metric.items():
        table.add_row(
            metric,
            str(found.runs),
            *(shown_pct(value) for value in (found.mean_pct, found.median_pct, found.p90_pct, found.bias_pct)),
            shown_pct(100 * found.covered),
        )
    return table


def _group_table(heading: str, groups: Mapping[str, Mapping[str, ErrorSummary]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"absolute error by {heading}, %: mean / median", title_justify="left")
    table.add_column(heading)
    table.add_column("runs", justify="right")
    present = [metric for metric in KEY_METRICS if any(metric in by_metric for by_metric in groups.values())]
    for metric in present:
        table.add_column(metric.replace("_", "\n", 1), justify="right", no_wrap=True)
    for name, by_metric in groups.items():
        runs = str(max(found.runs for found in by_metric.values()))
        table.add_row(Text(name), runs, *(mean_and_median(by_metric.get(metric)) for metric in present))
    return table
