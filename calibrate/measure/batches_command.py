"""``expert-router calibrate batches``: real batches beside simulated ones, iteration by iteration."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from sim.report import wide_console


@click.command("batches", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folders", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--at-least",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    help="Share of iterations that must agree within arrival jitter; below it the exit status is 1.",
)
def batches_command(folders: tuple[Path, ...], at_least: float) -> None:
    """Replay the live arrivals of measurements (FOLDERS of ``calibrate measure``) through the simulated scheduler.

    Users' requests enter when they really were sent, iterations take as long as they really took, and every batch is
    compared with the one that the engine logged: exactly, and allowing each request to enter one iteration earlier or
    later. The second separates a wrong scheduler from a wrong clock.
    """
    from calibrate.measure.files import MeasurementError, MeasurementFolder
    from calibrate.measure.iteration_records import lines_of, sent_of
    from calibrate.measure.live_batches import compare_live
    from sim.fleet import EngineSettings

    messages = Console(stderr=True)
    table = Table(title="real and simulated batches under live arrivals", title_justify="left")
    for heading in ("expert", "users", "requests", "iterations", "equal", "within jitter", "entered alike", "batch"):
        table.add_column(heading, justify="left" if heading == "expert" else "right")
    notes = []
    low = False
    try:
        for folder in folders:
            measured = MeasurementFolder.existing(folder)
            assert measured.meta is not None
            settings = EngineSettings(**measured.meta.settings)
            labels = [p.label for p in measured.meta.points if p.label.startswith("closed")]
            if not labels:
                raise MeasurementError(f"{folder}: no live users were measured; give measure more --minutes")
            for label in labels:
                found = compare_live(
                    lines_of(measured.iterations[measured.iterations["point"] == label]),
                    sent_of(measured.requests[measured.requests["point"] == label]),
                    settings,
                )
                low = low or found.within_jitter < at_least
                table.add_row(
                    folder.name,
                    label.partition("#")[0].removeprefix("closed users="),
                    f"{found.requests}",
                    f"{found.iterations}",
                    f"{found.exact:.1%}",
                    f"{found.within_jitter:.1%}",
                    f"{found.admitted_same:.1%}",
                    f"{found.batch_simulated:.2f} / {found.batch_real:.2f}",
                )
                if found.first_difference is not None:
                    notes.append(f"{folder.name}, {label}: first difference beyond jitter: {found.first_difference}")
    except MeasurementError as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    console = wide_console()
    console.print(table)
    console.print("batch: requests an iteration, simulated / real", highlight=False)
    for note in notes:
        console.print(note, highlight=False)
    if low:
        raise SystemExit(1)
