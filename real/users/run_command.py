"""``expert-router run``: parse, call ``real.users.run.run``, show and write."""

from pathlib import Path

import click
from rich.console import Console

from sim.fleet_file import FleetFileError, load_fleet
from sim.outputs import DEFAULT_FORMATS, FORMATS, result_json, write_result
from sim.report import print_report
from sim.simulate_command import UserList, make_folder, progress_bar
from sim.traces import TraceError


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--fleet", metavar="NAME", help="One of the file's fleets; default: each in turn.")
@click.option("--users", type=UserList(), help="Loads instead of the file's: 1,8,32.")
@click.option("--duration", "duration_s", type=click.FloatRange(min=0, min_open=True), help="Seconds of each run.")
@click.option("--url", help="A gateway or expert that runs already; default: start the fleet, and stop it afterwards.")
@click.option(
    "--replica-url",
    "replicas",
    multiple=True,
    metavar="EXPERT=URL",
    help="With --url: an expert's replica, to ask its engine for queue and KV cache; may be repeated.",
)
@click.option(
    "--logs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("logs"),
    show_default=True,
    help="Folder for the logs of a fleet that is started here; with --url: of the one that runs there.",
)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a value of the file.")
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the file's.")
@click.option("--replications", type=click.IntRange(min=1), help="Instead of the file's.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Texts of the classes.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for tables, records, pictures.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(FORMATS),
    help=f"What to write into --out; may be repeated; default: {', '.join(DEFAULT_FORMATS)}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON instead of tables.")
def command(
    file: Path,
    fleet: str | None,
    users: list[int] | None,
    duration_s: float | None,
    url: str | None,
    replicas: tuple[str, ...],
    logs: Path,
    overrides: tuple[str, ...],
    seed: int | None,
    replications: int | None,
    prompts: Path | None,
    out: Path | None,
    formats: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure every fleet of FILE at every load with real users: what simulate predicts, with the same requests.

    Ctrl-C ends it early and keeps what was measured.
    """
    messages = Console(stderr=True)
    if formats and out is None:
        raise click.UsageError("--format needs --out, the folder to write into")
    if replicas and url is None:
        raise click.UsageError("--replica-url needs --url; a fleet that is started here is known")
    from real.experts.expert_server import EngineFailedError
    from real.users.run import run

    try:
        if out is not None:
            make_folder(out)
        with progress_bar(messages, "measuring") as progress:
            result = run(
                load_fleet(file, overrides),
                fleet=fleet,
                users=users,
                duration_s=duration_s,
                url=url,
                replica_urls=_by_expert(replicas) if replicas else None,
                seed=seed,
                replications=replications,
                corpus=prompts,
                logs=logs,
                tell=lambda line: messages.print(line, highlight=False, markup=False, soft_wrap=True),
                progress=progress,
            )
    except EngineFailedError as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    except (FleetFileError, TraceError, ValueError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    if not result.runs:
        messages.print("interrupted before the first run had begun: nothing to show", style="yellow")
        raise SystemExit(130)
    if as_json:
        click.echo(result_json(result))
    else:
        print_report(result)
    if out is not None:
        written = write_result(result, out, formats or DEFAULT_FORMATS)
        messages.print(f"wrote {len(written)} files to {out}", highlight=False)
    if result.interrupted:
        messages.print("interrupted: the figures cover what had been measured", style="yellow")
        raise SystemExit(130)
    if not any(row["completed"] for row in result.summary_rows):
        messages.print("not one request completed", style="red")
        raise SystemExit(1)


def _by_expert(replicas: tuple[str, ...]) -> dict[str, list[str]]:
    urls: dict[str, list[str]] = {}
    for text in replicas:
        expert, _, url = text.partition("=")
        if not expert or not url.startswith("http"):
            raise ValueError(f"--replica-url {text}: expected EXPERT=URL, for example code=http://127.0.0.1:8100")
        urls.setdefault(expert, []).append(url)
    return urls
