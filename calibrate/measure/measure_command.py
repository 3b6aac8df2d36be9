"""``expert-router calibrate measure``: real engines, measured for a few minutes each, become profiles."""

import shlex
import sys
from pathlib import Path

import click
from rich.console import Console

from sim.report import wide_console

_MODEL_FILE = """\
name: measured
workload:
  classes: {{any: {{prompt_tokens: 1, output_tokens: 1}}}}
  load: {{kind: closed_loop, users: 1}}
fleets:
  measured:
    experts:
      {name}: {{model: {model}, quantization: {quantization}, gpu: {gpu}}}
"""


@click.command("measure", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--fleet", "fleets", multiple=True, metavar="NAME", help="Only experts of this fleet; may be repeated.")
@click.option("--expert", "experts", multiple=True, metavar="NAME", help="Only this expert; may be repeated.")
@click.option("--model", help="Measure this model instead of a file's experts.")
@click.option("--quantization", help="With --model; default: bf16.")
@click.option("--gpu", help="With --model; CPU measures the machine itself.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a value of the file.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    help="Of measuring, per engine; starting it is not counted.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results/calibration"),
    show_default=True,
    help="Folder for records and profiles; an interrupted measurement in it goes on.",
)
def measure_command(
    file: Path | None,
    fleets: tuple[str, ...],
    experts: tuple[str, ...],
    model: str | None,
    quantization: str | None,
    gpu: str | None,
    overrides: tuple[str, ...],
    minutes: float,
    out: Path,
) -> None:
    """Start each different engine of FILE for real, measure it, and write profiles and a calibrated fleet file.

    DIR gets, per expert, a folder of records (Parquet) that is complete after every point and EXPERT.profile.json; and
    fleet.calibrated.yaml, which ``simulate`` takes as it is. The same command again goes on where an interrupted one
    stopped. For the time being the machine should do nothing else.
    """
    from calibrate.measure.files import MeasurementError
    from calibrate.measure.fleet import FleetMeasurement
    from calibrate.measure.measured_experts import distinct_experts, without_profiles
    from sim.feasibility import check_feasible
    from sim.fleet_file import FleetFileError, load_fleet, parse_fleet
    from sim.traces import TraceError, read_workload_data

    messages = Console(stderr=True)
    if (file is None) == (model is None):
        raise click.UsageError("give either a fleet file or --model and --gpu")
    if model is not None and gpu is None:
        raise click.UsageError("--model needs --gpu, such as --gpu CPU")
    if model is None and (gpu or quantization):
        raise click.UsageError("--gpu and --quantization go with --model; a fleet file states its own")
    try:
        if file is not None:
            fleet_file = load_fleet(file, overrides)
        else:
            text = _MODEL_FILE.format(name=model, model=model, quantization=quantization or "bf16", gpu=gpu)
            fleet_file = parse_fleet(text, overrides)
        chosen = distinct_experts(fleet_file, fleets, experts)
        check_feasible(without_profiles(fleet_file), read_workload_data(fleet_file.workload))
        calibration = FleetMeasurement(
            fleet_file,
            chosen,
            out=out,
            messages=messages,
            console=wide_console(),
            command=_command_line(),
            whole_file=file is not None,
        )
        for expert in chosen:
            calibration.measure(expert, minutes=minutes)
            calibration.fit(expert)
        complete = calibration.write()
    except (FleetFileError, TraceError, MeasurementError, ValueError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        messages.print(f"stopped; finished points are in {out}, the same command goes on", highlight=False)
        raise SystemExit(130) from None
    if not complete:
        raise SystemExit(1)


def _command_line() -> str:
    """The command as typed."""
    return shlex.join(["expert-router", *sys.argv[1:]])
