"""Calibration and real runs by turns, so that what is predicted and what is measured meet the same machine.

A machine's speed wanders over minutes. Engines that are all measured first and run afterwards would be compared across
that; a part of their calibration before each run, and the last part behind the last one, has a steady drift fall out.
Nothing of a run goes into the calibration.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from calibrate.measure.files import MeasurementError
from calibrate.measure.fleet import FleetMeasurement
from real.serving.fleet import RunningFleet
from real.users.run import run
from sim.outputs import write_result
from sim.result import Result
from sim.run import with_changes
from sim.spec import FleetFile

RECORDS = ("csv", "parquet")
"""Formats in which a check keeps what was predicted and measured."""

Step = Callable[[str], AbstractContextManager[Callable[[float], None] | None]]
"""Opens a step by its description; inside it is told the share that is done."""


def take_turns(
    file: FleetFile,
    served: RunningFleet,
    calibration: FleetMeasurement | None,
    *,
    minutes: float,
    folder: Path,
    step: Step,
) -> tuple[list[Result], bool]:
    """Run a fleet for real ``check.repeats`` times, and calibrate its engines before, in between and afterwards.

    Each run has its own draw of requests (``of_repeat``), or what coincides in one draw would coincide in all of them.
    Ctrl-C ends it early, and so does an engine that can be measured no more; with at least one run measured what there
    is is returned.

    Args:
        file: with its loads; one replication of each is run.
        served: one of its fleets, whose engines run; its gateway is started here.
        calibration: of those engines that have no profile; None: all have one.
        minutes: of calibrating each engine, in all.
        folder: for the records of each run, which are written as soon as there are any.
        step: shows progress of a run.

    Returns:
        One result a run, and whether runs or parts of the calibration are missing.

    Raises:
        FleetFileError, TraceError, ValueError: the file cannot work, see ``run``.
        MeasurementError: something could not be measured, before anything was run.
        EngineFailedError: the gateway did not start.
        KeyboardInterrupt: the user stopped before anything was measured.
    """
    repeats = file.check.repeats
    measured: list[Result] = []
    try:
        for repeat in range(repeats):
            _calibrate(calibration, minutes, (repeat + 1) / (repeats + 1))
            if not repeat:
                served.start_gateway()
            with step(f"measuring, run {repeat + 1} of {repeats}") as progress:
                result = run(
                    of_repeat(file, repeat),
                    fleet=served.name,
                    url=served.url,
                    replica_urls=served.replica_urls,
                    progress=progress,
                )
            if result.runs:
                measured.append(result)
                write_result(result, folder / f"measured-{repeat + 1}", RECORDS)
            if result.interrupted:
                return measured, True
        _calibrate(calibration, minutes, 1.0)
    except (KeyboardInterrupt, MeasurementError):
        if not measured:
            raise
        return measured, True
    return measured, False


def of_repeat(file: FleetFile, repeat: int) -> FleetFile:
    """Return the file with the seed of one of the repeated runs, 0-based, and one replication."""
    return with_changes(file, users=None, seed=file.run.seed + repeat, replications=1)


def _calibrate(calibration: FleetMeasurement | None, minutes: float, share: float) -> None:
    if calibration is not None:
        for expert in calibration.experts:
            if not calibration.measure(expert, minutes=minutes, share=share):
                raise MeasurementError("not all was measured; what was is kept, the same command goes on from there")
