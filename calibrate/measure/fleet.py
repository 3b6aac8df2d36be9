"""Measuring the engines of a fleet file, with progress and messages, and writing what comes of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from calibrate.measure.engine_under_test import EngineGoneError, EngineUnderTest, Start, start_expert
from calibrate.measure.grid import Lengths, lengths_of
from calibrate.measure.measured_experts import CALIBRATED_FILE, DistinctExpert, calibrated_yaml, write_text
from calibrate.measure.measured_profile import fit_folder
from calibrate.measure.one_engine import WAITING, Outcome, Progress, measure_expert
from calibrate.measure.report import print_measured
from calibrate.measure.router import RouterCosts, measure_router
from calibrate.measure.router_confusion import router_confusion
from sim.fleet_file import LoadedFleetFile
from sim.resolve import engine_limits
from sim.traces import read_workload_data

ROUTER_FILE = "router.json"


class FleetMeasurement:
    """Engines of a fleet file while they are measured, each in one go or a part at a time, and what is written of them.

    One that does not come up is told and left out; the others are measured all the same.

    Attributes:
        experts: which engines.
    """

    def __init__(
        self,
        file: LoadedFleetFile,
        experts: Sequence[DistinctExpert],
        *,
        out: Path,
        messages: Console,
        console: Console,
        command: str = "expert-router",
        whole_file: bool = True,
        start: Start = start_expert,
    ):
        """Measure nothing yet.

        Args:
            file: as loaded; with ``whole_file`` its workload's lengths are measured, and its router.
            experts: which engines.
            out: folder for records, profiles and the calibrated file; what was measured in it before is not measured
                again.
            messages: told how far it is.
            console: told what was found.
            command: noted in all that is written.
            whole_file: the file is a user's, not made for one model.
            start: starts an engine, or finds it where it runs already.
        """
        self.experts = experts
        self._file = file
        self._out = out
        self._messages = messages
        self._console = console
        self._command = command
        self._whole_file = whole_file
        self._start = start
        self._outcomes: dict[str, Outcome] = {}
        self._profiles: dict[tuple[str, str], str] = {}
        self._router = _Router(file, experts, out, messages, start) if whole_file else None

    @property
    def is_complete(self) -> bool:
        """Whether every engine was measured for as long as it was to be."""
        return all(each.name in self._outcomes and self._outcomes[each.name].complete for each in self.experts)

    def measure(self, expert: DistinctExpert, *, minutes: float, share: float = 1.0) -> bool:
        """Measure one of the engines for a share of so many minutes, what was measured before included.

        The router is measured in front of the last of them, once.

        Returns:
            Whether it was, and the router; if not, why has been told.

        Raises:
            MeasurementError: see ``one_engine.measure_expert``.
        """
        afterwards = None
        if self._router is not None and expert is self.experts[-1]:
            afterwards = self._router.measure_for(expert)
        try:
            with _progress(self._messages, 60 * minutes * share) as progress:
                outcome = measure_expert(
                    expert.name,
                    expert.spec,
                    folder=self._out / expert.name,
                    lengths=_lengths(self._file, expert, whole_file=self._whole_file),
                    minutes=minutes,
                    share=share,
                    start=self._start,
                    cores=_cores(self._file, expert),
                    port=self._file.serve.expert_port,
                    command=self._command.split(" "),
                    progress=progress,
                    afterwards=afterwards,
                )
        except EngineGoneError as error:  # the others may well run
            self._say(str(error))
            return False
        self._outcomes[expert.name] = outcome
        if self._router is not None and expert is self.experts[-1]:
            self._router.measure_behind(expert)  # if that was not done while its engine ran
        if outcome.reason:
            self._say(outcome.reason)
            kept = 0 if outcome.measured.meta is None else len(outcome.measured.meta.points)
            self._tell(f"{expert.name}: {kept} points are kept; the same command goes on from there")
        return not outcome.reason and (self._router is None or not self._router.failed)

    def fit(self, expert: DistinctExpert) -> None:
        """Write the profile of an engine, if it was measured.

        Raises:
            MeasurementError: too little was.
        """
        outcome = self._outcomes.get(expert.name)
        if outcome is None:
            return
        found = fit_folder(outcome.measured)
        path = self._out / f"{expert.name}.profile.json"
        write_text(path, found.profile.model_dump_json(indent=1) + "\n")
        print_measured(expert.name, found, self._console)
        self._tell(f"wrote {path}")
        self._profiles |= dict.fromkeys(expert.places, path.name)

    def write(self) -> bool:
        """Write the calibrated file, with the profiles fitted so far; return whether all was measured completely."""
        if self._router is None:
            return self.is_complete
        measured = [each for each in self.experts if each.name in self._outcomes]
        if measured:
            self._router.measure_behind(measured[-1])
        costs, done = self._router.costs()
        fields: dict[str, dict[str, Any]] = {name: dict(each) for name, each in costs.items()}
        for name in fields:
            confusion = router_confusion(self._file, name)
            if confusion is not None:
                fields[name]["confusion"] = confusion
                self._tell(_told(confusion))
        if self._profiles or not self.experts:
            path = self._out / CALIBRATED_FILE
            write_text(path, calibrated_yaml(self._file, self._profiles, fields, f"written by {self._command}"))
            self._tell(f"wrote {path}; simulate takes it as it is")
        return self.is_complete and done

    def _tell(self, text: str) -> None:
        self._messages.print(text, highlight=False)

    def _say(self, text: str) -> None:
        self._messages.print(text, style="red", highlight=False, markup=False, soft_wrap=True)


def _told(confusion: Mapping[str, Mapping[str, float]]) -> str:
    """Say what share of each class the classifier takes for what it is."""
    right = ", ".join(f"{name} {shares[name]:.0%}" for name, shares in confusion.items())
    return f"router: prompts taken for what they are: {right}"


class _Router:
    """Measures the file's router once, in front of whichever engine runs last, and keeps it in ``router.json``.

    Attributes:
        failed: it could not be.
    """

    def __init__(
        self, file: LoadedFleetFile, chosen: Sequence[DistinctExpert], out: Path, messages: Console, start: Start
    ):
        self._file = file
        self._start = start
        self._out = out
        self._messages = messages
        self.failed = False
        fleets = dict.fromkeys(fleet for each in chosen for fleet, _ in each.places)
        self._fleets = [name for name in fleets if file.fleets[name].router is not None]

    def measure_for(self, expert: DistinctExpert) -> Callable[[EngineUnderTest], None] | None:
        """Return what to do with an expert's engine once it is measured; None when there is nothing to do."""
        if not self._fleets or self._kept() is not None:
            return None
        return lambda engine: self._measure(expert, engine)

    def measure_behind(self, expert: DistinctExpert) -> None:
        """Start an expert's engine to measure the router in front of it, unless there is nothing to do."""
        if not self._fleets or self._kept() is not None or self.failed:
            return
        self._messages.print(f"{expert.name}: starting the engine for the router", highlight=False)
        cores, port = _cores(self._file, expert), self._file.serve.expert_port
        try:
            engine = self._start(expert.name, expert.spec, cores, port, self._out / expert.name)
        except EngineGoneError as error:
            self._say(error)
            return
        try:
            self._measure(expert, engine)
        finally:
            engine.stop()

    def costs(self) -> tuple[dict[str, dict[str, float]], bool]:
        """Return the fields of each fleet's router, and whether they were measured where there is one."""
        if not self._fleets:
            return {}, True
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
        self.failed = True
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


@contextmanager
def _progress(console: Console, budget_s: float) -> Iterator[Progress]:
    """Show what is measured and the time left; on a terminal as a bar, elsewhere a line at each engine."""
    if not console.is_terminal:
        told: set[str] = set()

        def tell(measured_s: float, what: str) -> None:
            name, _, doing = what.partition(": ")
            line = what if doing == WAITING else f"{name}: measuring until {budget_s:.0f} s are measured"
            if line not in told or doing == WAITING:
                console.print(line, highlight=False)
            told.add(line)

        yield tell
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
