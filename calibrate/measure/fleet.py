"""Measuring the engines of a fleet file, with progress and messages, and writing what comes of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from calibrate.measure.engine_under_test import EngineGoneError, EngineUnderTest, Start, start_expert
from calibrate.measure.files import MeasurementError
from calibrate.measure.grid import Lengths, lengths_of
from calibrate.measure.measured_experts import (
    CALIBRATED_FILE,
    DistinctExpert,
    calibrated_yaml,
    distinct_experts,
    write_text,
)
from calibrate.measure.measured_profile import fit_folder
from calibrate.measure.one_engine import Outcome, Progress, measure_expert
from calibrate.measure.report import print_measured
from calibrate.measure.router import RouterCosts, measure_router
from calibrate.measure.router_confusion import router_confusion
from sim.fleet_file import LoadedFleetFile
from sim.resolve import engine_limits
from sim.traces import read_workload_data

ROUTER_FILE = "router.json"


def measure_fleet(
    file: LoadedFleetFile, fleet: str, *, minutes: float, out: Path, messages: Console, start: Start = start_expert
) -> Path:
    """Measure the experts of one fleet that have no profile; return the calibrated fleet file.

    Args:
        file: as loaded.
        fleet: one of its fleets.
        minutes: of measuring, per engine.
        out: folder for records, profiles and the file; what was measured in it before is not measured again.
        messages: told how far it is.
        start: starts an engine, or finds it where it runs already.

    Raises:
        MeasurementError: see ``one_engine.measure_expert``; also when not all was measured.
        ValueError: the file has no such fleet.
    """
    missing = [each for each in distinct_experts(file, [fleet]) if each.spec.profile is None]
    if not measure_experts(file, missing, minutes=minutes, out=out, messages=messages, console=messages, start=start):
        raise MeasurementError(f"{fleet}: not all was measured; what was is kept in {out}, the same command goes on")
    return out / CALIBRATED_FILE


def measure_experts(
    file: LoadedFleetFile,
    chosen: Sequence[DistinctExpert],
    *,
    minutes: float,
    out: Path,
    messages: Console,
    console: Console,
    command: str = "expert-router",
    whole_file: bool = True,
    start: Start = start_expert,
) -> bool:
    """Measure engines and write a profile of each and the calibrated file; return whether all were measured completely.

    One that does not come up is told and left out; the others are measured all the same.

    Args:
        file: as loaded; with ``whole_file`` its workload's lengths are measured, and the calibrated file is written.
        chosen: which engines.
        minutes: of measuring, per engine.
        out: folder for records, profiles and the file.
        messages: told how far it is.
        console: told what was found.
        command: noted in all that is written.
        whole_file: the file is a user's, not made for one model.
        start: starts an engine, or finds it where it runs already.
    """
    complete = True
    profiles: dict[tuple[str, str], str] = {}
    measured: list[DistinctExpert] = []
    router = _Router(file, chosen, out, messages, start) if whole_file else None
    for expert in chosen:
        afterwards = router.measure_for(expert) if router is not None and expert is chosen[-1] else None
        try:
            outcome = _measure_one(
                file, expert, minutes, out, messages, command, afterwards, start, whole_file=whole_file
            )
        except EngineGoneError as error:  # the others may well run
            messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
            complete = False
            continue
        measured.append(expert)
        _fit_and_write(expert.name, outcome, out, messages, console)
        profiles |= dict.fromkeys(expert.places, f"{expert.name}.profile.json")
        complete = complete and outcome.complete
    if router is not None:
        costs, done = router.costs(measured)
        complete = complete and done
        fields: dict[str, dict[str, Any]] = {name: dict(each) for name, each in costs.items()}
        for name in fields:
            confusion = router_confusion(file, name)
            if confusion is not None:
                fields[name]["confusion"] = confusion
                messages.print(_told(confusion), highlight=False)
        if profiles or not chosen:
            write_text(out / CALIBRATED_FILE, calibrated_yaml(file, profiles, fields, f"written by {command}"))
            messages.print(f"wrote {out / CALIBRATED_FILE}; simulate takes it as it is", highlight=False)
    return complete


def _told(confusion: Mapping[str, Mapping[str, float]]) -> str:
    """Say what share of each class the classifier takes for what it is."""
    right = ", ".join(f"{name} {shares[name]:.0%}" for name, shares in confusion.items())
    return f"router: prompts taken for what they are: {right}"


def _measure_one(
    file: LoadedFleetFile,
    expert: DistinctExpert,
    minutes: float,
    out: Path,
    messages: Console,
    command: str,
    afterwards: Callable[[EngineUnderTest], None] | None,
    start: Start,
    *,
    whole_file: bool,
) -> Outcome:
    with _progress(messages, 60 * minutes) as progress:
        outcome = measure_expert(
            expert.name,
            expert.spec,
            folder=out / expert.name,
            lengths=_lengths(file, expert, whole_file=whole_file),
            minutes=minutes,
            start=start,
            cores=_cores(file, expert),
            port=file.serve.expert_port,
            command=command.split(" "),
            progress=progress,
            afterwards=afterwards,
        )
    if not outcome.complete:
        messages.print(outcome.reason, style="red", highlight=False, markup=False, soft_wrap=True)
        meta = outcome.measured.meta
        kept = 0 if meta is None else len(meta.points)
        messages.print(f"{expert.name}: {kept} points are kept; the same command goes on from there", highlight=False)
    return outcome


class _Router:
    """Measures the file's router once, in front of whichever engine runs last, and keeps it in ``router.json``."""

    def __init__(
        self, file: LoadedFleetFile, chosen: Sequence[DistinctExpert], out: Path, messages: Console, start: Start
    ):
        self._file = file
        self._start = start
        self._out = out
        self._messages = messages
        self._failed = False
        fleets = dict.fromkeys(fleet for each in chosen for fleet, _ in each.places)
        self._fleets = [name for name in fleets if file.fleets[name].router is not None]

    def measure_for(self, expert: DistinctExpert) -> Callable[[EngineUnderTest], None] | None:
        """Return what to do with an expert's engine once it is measured; None when there is nothing to do."""
        if not self._fleets or self._kept() is not None:
            return None
        return lambda engine: self._measure(expert, engine)

    def costs(self, measured: Sequence[DistinctExpert]) -> tuple[dict[str, dict[str, float]], bool]:
        """Return the fields of each fleet's router, and whether they were measured where there is one.

        An engine, of those that could be measured, is started for it when none was needed for anything else.
        """
        if not self._fleets:
            return {}, True
        if self._kept() is None and measured and not self._failed:
            expert = measured[-1]
            self._messages.print(f"{expert.name}: starting the engine for the router", highlight=False)
            try:
                engine = self._start(
                    expert.name,
                    expert.spec,
                    _cores(self._file, expert),
                    self._file.serve.expert_port,
                    self._out / expert.name,
                )
            except EngineGoneError as error:
                self._say(error)
            else:
                try:
                    self._measure(expert, engine)
                finally:
                    engine.stop()
        kept = self._kept()
        return ({}, False) if kept is None else ({name: kept.model_dump() for name in self._fleets}, True)

    def _measure(self, expert: DistinctExpert, engine: EngineUnderTest) -> None:
        self._messages.print("measuring the router", highlight=False)
        try:
            found = measure_router(self._file, self._fleets[0], expert.spec, engine, self._out / "router")
            write_text(self._out / ROUTER_FILE, found.model_dump_json(indent=1) + "\n")
        except (EngineGoneError, ValueError, OSError) as error:
            self._say(error)
            return
        shown = ", ".join(f"{name.removesuffix('_s')} {1e6 * value:.4g} µs" for name, value in found)
        self._messages.print(f"router: {shown}", highlight=False)

    def _kept(self) -> RouterCosts | None:
        try:
            return RouterCosts.model_validate_json((self._out / ROUTER_FILE).read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None

    def _say(self, error: Exception) -> None:
        self._failed = True
        text = f"the router was not measured: {error}"
        self._messages.print(text, style="red", highlight=False, markup=False, soft_wrap=True)


def _lengths(file: LoadedFleetFile, expert: DistinctExpert, *, whole_file: bool) -> Lengths:
    workload = file.workload if whole_file else None
    return lengths_of(workload, read_workload_data(file.workload), engine_limits(expert.spec)[0])


def _cores(file: LoadedFleetFile, expert: DistinctExpert) -> tuple[int, ...]:
    """The cores that the expert's first replica gets when its fleet is served."""
    from real.experts.cores import place_replicas

    fleet, name = expert.places[0]
    placements, _ = place_replicas(file.fleets[fleet].experts)
    return placements[name][0].cores


def _fit_and_write(name: str, outcome: Outcome, out: Path, messages: Console, console: Console) -> None:
    found = fit_folder(outcome.measured)
    path = out / f"{name}.profile.json"
    write_text(path, found.profile.model_dump_json(indent=1) + "\n")
    print_measured(name, found, console)
    messages.print(f"wrote {path}", highlight=False)


@contextmanager
def _progress(console: Console, budget_s: float) -> Iterator[Progress]:
    """Show what is measured and the time left; on a terminal as a bar, elsewhere a line at each engine."""
    if not console.is_terminal:
        yield lambda measured_s, what: None if "waiting" not in what else console.print(what, highlight=False)
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=budget_s, left="")

        def show(measured_s: float, what: str) -> None:
            left_s = max(0.0, budget_s - measured_s)
            bar.update(
                task, completed=measured_s, description=what, left=f"{left_s // 60:.0f}:{left_s % 60:02.0f} left"
            )

        yield show
