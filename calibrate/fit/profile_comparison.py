"""Profiles side by side: what one quantization, model or GPU takes for the same iterations as another.

The work compared is the same for all: a decode iteration of so many requests that have so many tokens of KV each, and
the prefill of one prompt alone. A ratio is to the first profile; its error bound comes from both profiles' errors on
points that their fits had not seen, taken as independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING

from sim.profile import Profile
from sim.resolve import profile_of, resolve_expert
from sim.service_curve import IterationWork, ServiceCurve
from sim.spec import ExpertSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

KV_TOKENS = 200
"""Of each decoding request in the iterations that are compared."""
BATCHES = (1, 4, 16, 64)
PROMPTS = (128, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedWork:
    """One iteration, by every profile.

    Attributes:
        what: the work.
        seconds: one a profile.
        ratios: to the first profile.
        errors: of the ratios, relative, 90 %; 0 for the first.
        beyond: of each profile whether the work is beyond what it was fitted on.
    """

    what: str
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    errors: tuple[float, ...]
    beyond: tuple[bool, ...]


def decode_work(requests: int, kv_tokens: int = KV_TOKENS) -> IterationWork:
    """Return a decode iteration of so many requests."""
    return IterationWork(0, 0, 0, 0, requests, requests * kv_tokens)


def prefill_work(tokens: int) -> IterationWork:
    """Return the prefill of one prompt in one chunk."""
    return IterationWork(tokens, 1, tokens * (tokens + 1) // 2, tokens, 0, 0)


def read_curve(path: Path) -> tuple[Profile, ServiceCurve]:
    """Return a profile file with its curve.

    Raises:
        ProfileError: it cannot be read.
        UnknownNameError, ValueError: it is of a model, GPU or quantization that the catalogue lacks.
    """
    spec = ExpertSpec(model="llama-3-8b", gpu="H100-SXM", profile=str(path.absolute()))
    profile = profile_of(spec)
    assert profile is not None
    found = profile.expert
    identity = {
        "model": found.model,
        "quantization": found.quantization,
        "gpu": found.gpu,
        "tensor_parallel_size": found.tensor_parallel_size,
        "engine": found.engine,
    }
    return profile, resolve_expert(profile.name, spec.model_copy(update=identity)).curve


def compare_profiles(curves: Sequence[tuple[Profile, ServiceCurve]]) -> list[ComparedWork]:
    """Return the same iterations by every profile."""
    works = [(f"decode, {batch} requests", decode_work(batch)) for batch in BATCHES]
    works += [(f"prefill, {tokens} tokens", prefill_work(tokens)) for tokens in PROMPTS]
    rows = []
    for what, work in works:
        seconds = tuple(curve.iteration_s(work) for _, curve in curves)
        away = [
            curve.source.doublings_beyond(work.decodes, work.decode_kv_tokens, work.prefill_tokens)
            for _, curve in curves
        ]
        errors = [
            profile.residuals.p90_absolute_error * (1 + profile.range.error_growth_per_doubling * doublings)
            for (profile, _), doublings in zip(curves, away, strict=True)
        ]
        rows.append(
            ComparedWork(
                what=what,
                seconds=seconds,
                ratios=tuple(each / seconds[0] for each in seconds),
                errors=(0.0, *(hypot(errors[0], error) for error in errors[1:])),
                beyond=tuple(doublings > 0 for doublings in away),
            )
        )
    return rows


def comparison_table(profiles: Sequence[Profile], rows: Sequence[ComparedWork]) -> "Table":
    """Return a table for a terminal: milliseconds, and the ratio to the first profile with its error."""
    from rich.table import Table

    from sim.report import BOX

    table = Table(
        title=f"milliseconds of an iteration ({KV_TOKENS} tokens of KV a request), and ratio to the first profile",
        title_justify="left",
        box=BOX,
        title_style="bold",
    )
    table.add_column("work")
    for name in column_names(profiles):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.what, *(_cell(row, place).replace("<br>", "\n") for place in range(len(profiles))))
    return table


def comparison_markdown(
    profiles: Sequence[Profile], rows: Sequence[ComparedWork], *, title: str, command: str, picture: str
) -> str:
    """Return the comparison as a Markdown page that shows ``picture`` beside it."""
    names = column_names(profiles)
    lines = [
        f"# {title}",
        "",
        "Made by",
        "",
        f"    {command}",
        "",
        f"Milliseconds of one iteration (decoding requests have {KV_TOKENS} tokens of KV each), and the ratio to the "
        "first column. Its error bound, 90 %, is from iterations that the fits had not seen; (e) is beyond what was "
        "measured.",
        "",
        f"| work | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    lines += [f"| {row.what} | {' | '.join(_cell(row, place) for place in range(len(names)))} |" for row in rows]
    lines += ["", f"![iteration times]({picture})", "", "Where the profiles are from:", ""]
    lines += [
        f"- **{name}**: {profile.expert.engine_version}, {profile.residuals.measurements} {profile.residuals.what}, "
        f"median error {profile.residuals.median_absolute_error:.1%}, 90 % within "
        f"{profile.residuals.p90_absolute_error:.1%}. "
        f"{profile.provenance}"
        for name, profile in zip(names, profiles, strict=True)
    ]
    return "\n".join(lines) + "\n"


def comparison_picture(curves: Sequence[tuple[Profile, ServiceCurve]]) -> "Figure":
    """Return iteration times over batch size and over prompt length, a line a profile with its error."""
    import matplotlib as mpl
    import numpy as np

    from sim.plots import COLOURS, GREY, STYLE

    names = column_names([profile for profile, _ in curves])
    with mpl.rc_context(STYLE):
        from matplotlib.figure import Figure

        picture = Figure(figsize=(10, 4), layout="constrained")
        panels = picture.subplots(1, 2)
        batches = np.unique(np.geomspace(1, 64, 40).round().astype(int))
        prompts = np.unique(np.geomspace(16, 1024, 40).round().astype(int))
        for (profile, curve), name, colour in zip(curves, names, COLOURS, strict=False):
            error = profile.residuals.p90_absolute_error
            for ax, sizes, works in (
                (panels[0], batches, [decode_work(int(size)) for size in batches]),
                (panels[1], prompts, [prefill_work(int(size)) for size in prompts]),
            ):
                times_ms = np.array([1e3 * curve.iteration_s(work) for work in works])
                ax.plot(sizes, times_ms, color=colour, label=name)
                ax.fill_between(
                    sizes, times_ms / (1 + error), times_ms * (1 + error), color=colour, alpha=0.15, linewidth=0
                )
        for ax, heading, label in zip(
            panels,
            (f"decode iteration, ms ({KV_TOKENS} tokens of KV a request)", "prefill of one prompt, ms"),
            ("requests", "prompt tokens"),
            strict=True,
        ):
            ax.set_title(heading, loc="left", color=GREY)
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            ax.set_xlabel(label)
            ax.set_ylim(bottom=0)
        panels[0].legend(frameon=False, fontsize=9)
    return picture


def column_names(profiles: Sequence[Profile]) -> list[str]:
    """Return what tells the profiles apart (model, format, GPU, size, version), or their names if nothing does."""
    parts = [
        (
            profile.expert.model,
            profile.expert.quantization
            if profile.expert.engine.dtype == "auto" or profile.expert.quantization != "bf16"
            else profile.expert.engine.dtype,
            profile.expert.gpu,
            f"TP{profile.expert.tensor_parallel_size}",
            profile.expert.engine_version,
        )
        for profile in profiles
    ]
    differing = [place for place in range(5) if len({part[place] for part in parts}) > 1]
    names = [" ".join(part[place] for place in differing) for part in parts]
    return names if len(set(names)) == len(names) else [profile.name for profile in profiles]


def _cell(row: ComparedWork, place: int) -> str:
    from sim.report import number_text

    mark = " (e)" if row.beyond[place] else ""
    time = f"{number_text(1e3 * row.seconds[place])}{mark}"
    return time if not place else f"{time}<br>x {row.ratios[place]:.2f} ± {row.ratios[place] * row.errors[place]:.2f}"
