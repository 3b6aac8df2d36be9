"""``expert-router calibrate compare``: profiles side by side."""

from pathlib import Path

import click
from rich.console import Console

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("compare", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("profiles", nargs=-1, type=FILE, required=True)
@click.option("--report", type=FILE, help="Write a Markdown page, and its picture beside it.")
@click.option("--title", default="Profiles side by side", show_default=True, help="Of the page.")
def compare_command(profiles: tuple[Path, ...], report: Path | None, title: str) -> None:
    """Tell what the same iterations take by each of PROFILES, and the ratio to the first.

    For example one model in several quantizations, each measured by calibrate measure.
    """
    from calibrate.fit.profile_comparison import (
        compare_profiles,
        comparison_markdown,
        comparison_picture,
        comparison_table,
        read_curve,
    )
    from sim.plots import save_picture
    from sim.profile import ProfileError
    from sim.report import wide_console

    messages = Console(stderr=True)
    if len(profiles) < 2:
        raise click.UsageError("give at least two profiles to compare")
    try:
        curves = [read_curve(path) for path in profiles]
        rows = compare_profiles(curves)
        told = [profile for profile, _ in curves]
        wide_console().print(comparison_table(told, rows))
        if report is not None:
            picture = report.with_suffix(".png")
            save_picture(comparison_picture(curves), picture, "png")
            command = f"expert-router calibrate compare {' '.join(path.name for path in profiles)}"
            page = comparison_markdown(told, rows, title=title, command=command, picture=picture.name)
            report.write_text(page, encoding="utf-8")
            messages.print(f"wrote {report} and {picture}", highlight=False)
    except (ProfileError, ValueError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
