"""A fit on a terminal: its parameters, its errors on experiments it had not seen, and what to measure next."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibrate.fit import CONFIDENCE, Calibration, EngineGroup, Estimate, Observation, shape_of
from calibrate.next_measurements import OUTPUT_TOKENS, PROMPT_TOKENS, Knowledge, Suggestion

HeldOut = Sequence[tuple[Observation, float]]
"""Observations with the relative errors of fits that had not seen their experiments."""

UNITS = {
    "per_iteration_s": (1e6, "us per iteration"),
    "per_sequence_s": (1e6, "us per sequence"),
    "filter_fixed_s": (1e6, "us per iteration"),
    "top_p_passes": (1.0, "passes over the logits"),
    "top_k_passes": (1.0, "passes over the logits"),
}
"""Overhead -> its factor when printed, and unit; corrections are factors on the roofline's times."""


def print_fit(calibration: Calibration, held_out: Mapping[EngineGroup, HeldOut], console: Console) -> None:
    """Print what a fit was made of, and its errors by GPU and model."""
    console.print(
        f"fitted to {len(calibration.observations)} load stages of {len(calibration.experiments)} experiments",
        highlight=False,
    )
    for group, errors in held_out.items():
        console.print(_errors_table(group, errors))
    if calibration.left_out:
        console.print(f"{sum(calibration.left_out.values())} rows left out of the fit:", highlight=False)
        for reason, count in sorted(calibration.left_out.items(), key=lambda entry: (-entry[1], entry[0])):
            console.print(Text(f"  {count:4}  {reason}"), highlight=False, soft_wrap=True)


def print_knowledge(group: EngineGroup, known: Iterable[Knowledge], console: Console) -> None:
    """Print the parameters of a group's engines, the worst known first."""
    table = Table(box=box.SIMPLE_HEAD, title=f"parameters: {group.name}", title_justify="left")
    for heading, justify in (("parameter", "left"), ("value", "right"), (f"{CONFIDENCE:.0%} interval", "right")):
        table.add_column(heading, justify="right" if justify == "right" else "left", no_wrap=True)
    table.add_column("unit")
    table.add_column("% of an\niteration", justify="right")
    table.add_column("uncertainty,\n% of an iteration", justify="right")
    for each in known:
        factor, unit = UNITS.get(each.name, (1.0, "x the roofline"))
        table.add_row(
            each.name,
            *_value_and_interval(each.estimate, factor),
            unit,
            f"{100 * each.share:.1f}",
            f"{100 * each.felt:.1f}",
        )
    console.print(table)


def print_suggestions(parameter: str, suggestions: Sequence[Suggestion], console: Console) -> None:
    """Print which measurements would narrow the worst known parameter."""
    if not suggestions:
        console.print(f"{parameter} is known worst; no measurement of these experts would tell more of it")
        return
    title = (
        f"{parameter} is known worst; one more measurement would narrow it by\n"
        f"(median gap between tokens at a steady batch, {PROMPT_TOKENS} prompt and {OUTPUT_TOKENS:,} output tokens)"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="none")
    table.add_column("expert")
    table.add_column("batch", justify="right")
    table.add_column("narrower by, %", justify="right")
    for each in suggestions:
        model, quantization, gpu, size = each.expert
        table.add_row(f"{model}/{quantization}/{gpu}/{size}", str(each.batch), f"{100 * each.narrowing:.0f}")
    console.print(table)


def _value_and_interval(estimate: Estimate, factor: float) -> tuple[str, str]:
    value, low, high = (f"{factor * number:.3g}" for number in (estimate.value, estimate.low, estimate.high))
    return value, f"{low} .. {high}"


def _errors_table(group: EngineGroup, errors: HeldOut) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"error of the time per output token on experiments not in the fit, %: {group.name}",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("stages", "mean", "median", "p90", "bias"):
        table.add_column(heading, justify="right")
    groupings: tuple[Callable[[Observation], str], ...] = (
        lambda seen: "all",
        lambda seen: shape_of(seen.run)[2].name,
        lambda seen: shape_of(seen.run)[0].name,
    )
    for grouping in groupings:
        by_name: dict[str, list[float]] = {}
        for seen, error in errors:
            by_name.setdefault(grouping(seen), []).append(error)
        for name, found in sorted(by_name.items()):
            size = np.abs(found)
            figures = (np.mean(size), np.median(size), np.quantile(size, 0.9), np.mean(found))
            table.add_row(Text(name), str(len(found)), *(f"{100 * figure:.1f}" for figure in figures))
        table.add_section()
    return table
