"""A fit on a terminal: its parameters, its errors on experiments it had not seen, and what to measure next."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibrate.fit.fit import Calibration
from calibrate.fit.held_out import HeldOut
from calibrate.fit.next_measurements import OUTPUT_TOKENS, PROMPT_TOKENS, Knowledge, Suggestion
from calibrate.fit.observations import Observation
from calibrate.fit.parameters import CONFIDENCE, EngineGroup, Estimate
from calibrate.tables.run_engine import shape_of

UNITS = {
    "per_iteration_s": (1e6, "us"),
    "per_sequence_s": (1e6, "us"),
    "filter_fixed_s": (1e6, "us"),
    "top_p_passes": (1.0, "passes"),
    "top_k_passes": (1.0, "passes"),
}
"""Overhead -> its factor when printed, and unit; corrections are factors on the roofline's times."""


def print_fit(
    calibration: Calibration,
    known: Mapping[EngineGroup, Sequence[Knowledge]],
    held_out: Mapping[EngineGroup, HeldOut],
    console: Console,
) -> None:
    """Print the parameters of each group of engines, the errors of the fit, and what was left out of it."""
    fitted = f"fitted to {len(calibration.observations)} load stages of {len(calibration.experiments)} experiments"
    _print_line(console, fitted)
    _print_line(
        console, "share: of a typical iteration; +-: by how much one standard deviation of the parameter moves it;"
    )
    _print_line(console, "factors are on the roofline's times")
    for group, parameters in known.items():
        _print_line(console, f"\n{group.name}")
        console.print(_parameters_table(parameters))
        if group in calibration.delays_s:
            value, interval = _value_and_interval(calibration.delays_s[group], 1e3)
            _print_line(console, f"front-end delay of a request: {value} ms, {CONFIDENCE:.0%} interval {interval}")
        _print_line(console, "errors of the time per output token on experiments left out of the fit, %")
        console.print(_errors_table(held_out[group]))
    if calibration.left_out:
        _print_line(console, f"{sum(calibration.left_out.values())} rows not used:")
        for reason, count in sorted(calibration.left_out.items(), key=lambda entry: (-entry[1], entry[0])):
            _print_line(console, f"  {count:4}  {reason}")


def print_suggestions(
    group: EngineGroup, worst: Knowledge, suggestions: Sequence[Suggestion], console: Console
) -> None:
    """Print which measurements would narrow the worst known parameter of a group."""
    _print_line(console, f"\nknown worst of {group.name}: {worst.name}")
    if not suggestions:
        _print_line(console, "no measurement of these experts would tell more of it")
        return
    how = f"{PROMPT_TOKENS} prompt and {OUTPUT_TOKENS:,} output tokens, constant number in flight"
    _print_line(console, f"one more median gap between tokens ({how}) would narrow it by:")
    table = _table(("expert", "left"), ("in flight", "right"), ("% of its standard deviation", "right"))
    for each in suggestions:
        model, quantization, gpu, size = each.expert
        table.add_row(f"{model}/{quantization}/{gpu}/{size}", str(each.batch), f"{100 * each.narrowing:.0f}")
    console.print(table)


def _parameters_table(known: Iterable[Knowledge]) -> Table:
    table = _table(
        ("parameter", "left"),
        ("value", "right"),
        (f"{CONFIDENCE:.0%} interval", "right"),
        ("unit", "left"),
        ("share, %", "right"),
        ("+-, %", "right"),
    )
    for each in known:
        factor, unit = UNITS.get(each.name, (1.0, "factor"))
        value, interval = _value_and_interval(each.estimate, factor)
        table.add_row(each.name, value, interval, unit, f"{100 * each.share:.1f}", f"{100 * each.felt:.1f}")
    return table


def _value_and_interval(estimate: Estimate, factor: float) -> tuple[str, str]:
    value, low, high = (f"{factor * number:.3g}" for number in (estimate.value, estimate.low, estimate.high))
    return value, f"{low} .. {high}"


def _errors_table(errors: HeldOut) -> Table:
    table = _table(
        ("", "left"), ("stages", "right"), ("mean", "right"), ("median", "right"), ("p90", "right"), ("bias", "right")
    )
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
            table.add_row(name, str(len(found)), *(f"{100 * figure:.1f}" for figure in figures))
        table.add_section()
    return table


def _table(*headings: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading, justify in headings:
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _print_line(console: Console, text: str) -> None:
    console.print(Text(text), highlight=False, soft_wrap=True)
