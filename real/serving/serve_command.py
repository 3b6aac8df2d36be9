"""``expert-router serve``: run a fleet for real until told to stop."""

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
from rich.console import Console

from sim.report import wide_console

if TYPE_CHECKING:
    from real.serving.fleet import RunningFleet
    from sim.spec import ExpertSpec


@click.command("serve", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--fleet", "fleet_name", help="Which fleet of the file; needed when it has several.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a value of the file.")
@click.option(
    "--logs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("logs"),
    show_default=True,
    help="Folder for a log of each process and the state of the fleet.",
)
@click.option(
    "--log-iterations/--no-log-iterations",
    default=True,
    show_default=True,
    help="Engines log each iteration: 0.2 KB each, and what calibration reads.",
)
@click.option(
    "--log-requests/--no-log-requests",
    default=False,
    show_default=True,
    help="The gateway writes what became of each request to requests.jsonl in the folder of logs.",
)
@click.option(
    "--start-limit", "limit_s", type=click.FloatRange(min=1), default=900, show_default=True, help="Seconds to start."
)
def command(
    file: Path,
    fleet_name: str | None,
    overrides: tuple[str, ...],
    logs: Path,
    log_iterations: bool,
    log_requests: bool,
    limit_s: float,
) -> None:
    """Run the fleet of FILE: a vLLM server for each replica and the gateway in front of them, until Ctrl-C.

    Experts without a checkpoint get random weights in their model's shape. What dies is started again.
    """
    from real.experts.expert_server import EngineFailedError
    from real.serving.fleet import WARNING, RunningFleet, only_fleet
    from sim.fleet_file import FleetFileError, load_fleet

    messages = Console(stderr=True)

    def tell(line: str) -> None:
        style = "yellow" if line.startswith(WARNING) else None
        messages.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    try:
        fleet_file = load_fleet(file, overrides)
        name = only_fleet(fleet_file) if fleet_name is None else fleet_name
        fleet = RunningFleet(
            fleet_file, name, logs=logs, tell=tell, log_iterations=log_iterations, log_requests=log_requests
        )
    except (FleetFileError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    signal.signal(signal.SIGTERM, _as_interrupt)
    status = 0
    try:
        fleet.start(limit_s)
        _show(fleet, wide_console())
        fleet.supervisor.wait()
        messages.print(str(fleet.supervisor.failure), style="red", highlight=False, markup=False, soft_wrap=True)
        status = 1
    except EngineFailedError as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        status = 1
    except KeyboardInterrupt:
        tell("stopping: answers in flight may finish; again to end at once")
    try:
        fleet.stop()
    except KeyboardInterrupt:
        fleet.kill()
    raise SystemExit(status)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _weights(spec: "ExpertSpec") -> str:
    """Name a model's weights, and what they are computed in where the fleet file says so."""
    computed = "" if spec.engine.dtype == "auto" else f", computed in {spec.engine.dtype}"
    return f"{spec.model} {spec.quantization}{computed}"


def _show(fleet: "RunningFleet", console: Console) -> None:
    from rich.table import Table

    from real.loopback import LOOPBACK

    table = Table(title=f"fleet {fleet.name!r} at {fleet.url}", title_justify="left")
    for column in ("replica", "model", "on", "address", "KV blocks", "block", "seqs", "tokens", "max len", "vLLM"):
        table.add_column(column, justify="left" if column in ("replica", "model", "on", "address") else "right")
    for server in fleet.servers:
        plan, report = server.plan, server.report
        assert report is not None
        place = plan.placement
        where = f"cores {','.join(map(str, place.cores))}" if place.cores else f"GPU {','.join(map(str, place.gpus))}"
        settings = plan.settings
        table.add_row(
            plan.name,
            _weights(plan.spec),
            where,
            server.url,
            str(report.num_gpu_blocks),
            str(report.block_size),
            str(report.max_num_seqs or settings.max_num_seqs),
            str(report.max_num_batched_tokens or settings.max_num_batched_tokens),
            str(report.max_model_len),
            str(report.version),
        )
    console.print(table)
    model = fleet.plans[0].expert if fleet.file.fleets[fleet.name].router is None else "expert-router"
    spec = fleet.file.serve
    metrics = "" if fleet.supervisor.gateway is None else f"Metrics: http://{LOOPBACK}:{spec.metrics_port}/metrics\n"
    console.print(
        f"""{metrics}Try it:
  curl {fleet.url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 50}}'
Ctrl-C drains and stops.""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
