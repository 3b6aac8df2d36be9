"""``expert-router simulate``: parse, call ``sim.simulate``, show and write."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

import click
from rich.console import Console

from sim.fleet_file import FleetFileError, load_fleet
from sim.outputs import DEFAULT_FORMATS, FORMATS, result_json, write_chrome_trace, write_result
from sim.report import print_report
from sim.run import Progress, find_replica, simulate, trace_replica
from sim.traces import TraceError


class UserList(click.ParamType[list[int]]):
    """Comma-separated numbers of users."""

    name = "users"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return them as integers."""
        try:
            users = [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"expected whole numbers separated by commas such as 1,10,100, got {value!r}", param, ctx)
        if min(users) < 1:
            self.fail(f"numbers of users must be >= 1, got {min(users)}", param, ctx)
        return users


@click.command("simulate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--users", type=UserList(), help="Loads instead of the file's: 1,10,100,1000,4000.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a value of the file.")
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the file's.")
@click.option("--replications", type=click.IntRange(min=1), help="Instead of the file's.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: one a core where that pays.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for tables, records, pictures.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(FORMATS),
    help=f"What to write into --out; may be repeated; default: {', '.join(DEFAULT_FORMATS)}.",
)
@click.option("--chrome-trace", metavar="FLEET/EXPERT/REPLICA", help="Also write this replica's iterations (Perfetto).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON instead of tables.")
def command(
    file: Path | None,
    users: list[int] | None,
    overrides: tuple[str, ...],
    seed: int | None,
    replications: int | None,
    workers: int | None,
    out: Path | None,
    formats: tuple[str, ...],
    chrome_trace: str | None,
    as_json: bool,
) -> None:
    """Predict every fleet of FILE at every load: latency, throughput, utilisation and cost.

    Without FILE a small example fleet runs. Nothing but numpy is computed: no GPU, no vLLM, no network.
    """
    messages = Console(stderr=True)
    if chrome_trace is not None and out is None:
        raise click.UsageError("--chrome-trace needs --out, the folder to write it into")
    if formats and out is None:
        raise click.UsageError("--format needs --out, the folder to write into")
    try:
        if out is not None:
            make_folder(out)
        with fleet_path(file) as path:
            fleet_file = load_fleet(path, overrides)
            traced = None if chrome_trace is None else find_replica(fleet_file, chrome_trace)
            with progress_bar(messages) as progress:
                result = simulate(
                    fleet_file,
                    users=users,
                    seed=seed,
                    replications=replications,
                    workers=workers,
                    progress=progress,
                )
    except (FleetFileError, TraceError, ValueError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    if not result.runs:
        messages.print("interrupted before the first run had finished: nothing to show", style="yellow")
        raise SystemExit(130)
    if as_json:
        click.echo(result_json(result))
    else:
        print_report(result)
    if out is not None:
        written = write_result(result, out, formats or DEFAULT_FORMATS)
        if chrome_trace is not None and traced is not None:
            written.append(write_chrome_trace(trace_replica(result, *traced), chrome_trace, out))
        messages.print(f"wrote {len(written)} files to {out}", highlight=False)
    if file is None and not as_json:
        messages.print(HOW_TO_GO_ON, highlight=False, soft_wrap=True)
    if result.interrupted:
        messages.print(f"interrupted: the figures cover the {len(result.runs)} finished runs", style="yellow")
        raise SystemExit(130)


def make_folder(folder: Path) -> None:
    """Make a folder to write into, before anything is computed for it.

    Raises:
        ValueError: it cannot be made or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".expert-router.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written into: {error.strerror}") from error


HOW_TO_GO_ON = """
This was the packaged example. To go on:
  expert-router simulate --out results          the same, with tables, records and pictures in a folder
  expert-router simulate --users 1,100,2000     other loads
  expert-router simulate my-fleet.yaml          your own fleet (start from examples/minimal.yaml in the repository)
"""


@contextmanager
def fleet_path(file: Path | None) -> Iterator[Path]:
    """Yield the file to simulate: the given one, or the packaged example."""
    if file is not None:
        yield file
        return
    with as_file(files("sim") / "data" / "quickstart.yaml") as path:
        yield path


@contextmanager
def progress_bar(console: Console, what: str = "simulating") -> Iterator[Progress | None]:
    """Show progress with the time left on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)
