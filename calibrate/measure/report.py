"""What a measurement found, as tables."""

from rich.console import Console
from rich.table import Table

from calibrate.measure.measured_profile import MeasuredProfile
from sim.profile import Parameter, TermParameters

_UNITS = {
    "per_iteration": (1e3, "ms"),
    "weights": (1e3, "ms"),
    "per_token": (1e6, "µs"),
    "per_attention_pair": (1e9, "ns"),
    "per_prefill_chunk": (1e6, "µs"),
    "per_decode": (1e6, "µs"),
    "per_kv_token": (1e9, "ns"),
}


def print_measured(name: str, found: MeasuredProfile, console: Console) -> None:
    """Print a profile's terms with intervals, its errors, and what else the measurement says."""
    profile = found.profile
    terms = profile.parameters
    assert isinstance(terms, TermParameters)
    table = Table(title=f"{name}: {profile.name}", title_justify="left")
    for heading in ("term", "value", "90 % interval"):
        table.add_column(heading, justify="left" if heading == "term" else "right")
    for field, (factor, unit) in _UNITS.items():
        _add(table, field, getattr(terms, field), factor, unit)
    for knot in terms.matrix_knots:
        _add(table, f"matrix work of {knot.tokens} tokens", knot.seconds, 1e3, "ms")
    if terms.host is not None:
        for field, seconds in terms.host:
            _add(table, f"host {field}", seconds, 1e6, "µs")
    if profile.front_end is not None:
        for field, seconds in profile.front_end:
            if seconds is not None:
                _add(table, f"front end {field.removesuffix('_s')}", seconds, 1e6, "µs")
    console.print(table)
    worth = profile.residuals
    lines = [
        f"errors on points left out of the fit: mean {worth.mean_error:+.1%}, "
        f"median {worth.median_absolute_error:.1%}, 90 % within {worth.p90_absolute_error:.1%}; "
        f"{worth.measurements} iterations, "
        f"{found.matched:.1%} of the logged batches reproduced",
    ]
    if found.check:
        shown = ", ".join(f"{label} {error:+.1%}" for label, error in found.check.items())
        lines.append(f"kept out of the fit, all iterations together: {shown}")
    if len(found.drift) > 1:
        lines.append(
            f"reference point: {min(found.drift):.0%} to {max(found.drift):.0%} of its median time over the run"
        )
    for line in lines:
        console.print(line, highlight=False)


def _add(table: Table, name: str, value: Parameter, factor: float, unit: str) -> None:
    interval = (
        "" if value.low is None or value.high is None else f"{factor * value.low:.4g} to {factor * value.high:.4g}"
    )
    table.add_row(name, f"{factor * value.value:.4g} {unit}", interval)
