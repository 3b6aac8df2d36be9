"""``run``: what ``simulate`` predicts, measured: real users against a real fleet, and the same figures of it."""

import asyncio
import secrets
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from real.users.load_run import LoadRun
from real.users.prompts import PromptWriter, load_tokenizer, read_corpus, texts_of_classes
from real.users.target import Kill, Target, engines_of, fleet_target, wait_until_up
from sim.feasibility import check_feasible
from sim.fleet import Fleet
from sim.mistakes import did_you_mean
from sim.records import RunRecord
from sim.resolve import resolve_fleet
from sim.result import Measured, Result
from sim.run import Progress, loads, program_version, with_changes
from sim.simulation import RunPlan
from sim.spec import FleetFile
from sim.traces import read_workload_data
from sim.traffic import WorkloadData


def run(
    file: FleetFile,
    *,
    fleet: str | None = None,
    users: Sequence[int] | None = None,
    duration_s: float | None = None,
    url: str | None = None,
    replica_urls: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
    replications: int | None = None,
    corpus: Path | None = None,
    logs: Path = Path("logs"),
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    kill: Kill | None = None,
) -> Result:
    """Load real fleets of a file at every load, one run after the other, and return the records and figures.

    The requests are those that ``simulate`` sends: same seed, same classes, lengths, think times and arrivals. Ctrl-C
    ends it early: what was measured is returned, with ``interrupted`` set.

    Args:
        file: from ``load_fleet``.
        fleet: one of its fleets; None: all of them, one after the other.
        users: loads of the closed loop instead of the file's.
        duration_s: length of each run instead of the file's.
        url: of a gateway that runs already, or of the expert of a fleet without a router; None: the fleet is started,
            and stopped afterwards.
        replica_urls: with ``url``: expert -> where its replicas listen, to ask the engines for their figures; None: as
            the state file in ``logs`` says, if the fleet at ``url`` wrote it.
        seed: instead of the file's.
        replications: instead of the file's.
        corpus: JSON lines ``{"class", "text"}`` that prompts are made of; None: the packaged ones.
        logs: folder for the logs of a fleet that is started here, or of the one that runs at ``url``.
        tell: told in one line what happens while a fleet starts.
        progress: told how far it is.
        kill: with ``url``: makes the outages of the fleet there; a fleet that is started here is killed by this.

    Raises:
        FleetFileError: the file describes something that cannot work.
        TraceError: a trace or a table of lengths cannot be read.
        ValueError: an argument does not fit the file, a class has no text, or nothing answers at ``url``.
    """
    file = with_changes(file, users=users, seed=seed, replications=replications)
    if duration_s is not None:
        file = _with_duration(file, duration_s)
    data = read_workload_data(file.workload)
    check_feasible(file, data)
    names = _fleets_to_run(file, fleet, url)
    file = file.model_copy(update={"fleets": {name: file.fleets[name] for name in names}})
    texts = texts_of_classes(read_corpus(corpus), file.workload.classes)
    session = _Session(file, data, texts, progress)
    try:
        for name in names:
            with fleet_target(file, name, url, replica_urls, logs, tell, kill) as target:
                session.run_fleet(name, target)
            if session.interrupted:
                break
    except KeyboardInterrupt:  # while a fleet starts or stops; during a run Ctrl-C is handled there
        session.interrupted = True
    return session.result()


class _Session:
    """Runs fleets one after the other and keeps what came of it."""

    def __init__(
        self, file: FleetFile, data: WorkloadData, texts: dict[str, list[str]], progress: Progress | None
    ) -> None:
        self._file = file
        self._data = data
        self._texts = texts
        self._progress = progress
        self._nonce = secrets.randbelow(10**9)
        self._started = ""
        self._fleets = {name: resolve_fleet(file, name) for name in file.fleets}
        self._weights = [_weight(file, load) for load in loads(file.workload)] * file.run.replications
        self._total = sum(self._weights) * len(file.fleets)
        self._runs: list[RunRecord] = []
        self._urls: dict[str, str] = {}
        self._engines: dict[str, dict[str, str]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._current: LoadRun | None = None
        self.interrupted = False

    def result(self) -> Result:
        """What has been measured."""
        ran = {name: fleet for name, fleet in self._fleets.items() if name in self._urls}
        order = {name: place for place, name in enumerate(ran)}
        self._runs.sort(key=lambda run: (order[run.fleet], run.load, run.replication))
        return Result(
            file=self._file.model_copy(update={"fleets": {name: self._file.fleets[name] for name in ran}}),
            fleets=ran,
            runs=self._runs,
            version=program_version(),
            interrupted=self.interrupted,
            measured=Measured(started=self._started, urls=self._urls, engines=self._engines),
        )

    def run_fleet(self, name: str, target: Target) -> None:
        """Run every load and replication of one fleet."""
        fleet = self._fleets[name]
        self._started = self._started or datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._urls[name] = target.url
        self._engines[name] = engines_of(fleet, target)
        writers = prompt_writers(self._file, fleet, self._texts, nonce=self._nonce)
        plans = [
            RunPlan(
                fleet=fleet,
                workload=self._file.workload,
                run=self._file.run,
                data=self._data,
                load=load,
                replication=replication,
            )
            for load in loads(self._file.workload)
            for replication in range(self._file.run.replications)
        ]
        self._in_event_loop(lambda: self._run_all(plans, target, writers))

    def _in_event_loop(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do this in an event loop; in a thread of its own where this one has a loop already, as in a notebook."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            uvloop.run(work())
            return
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(lambda: uvloop.run(work()))
            try:
                future.result()
            except KeyboardInterrupt:
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._interrupt)
                future.result()

    def _interrupt(self) -> None:
        self.interrupted = True
        if self._current is not None:
            self._current.interrupt()

    async def _run_all(self, plans: Sequence[RunPlan], target: Target, writers: list[PromptWriter]) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._current = None
        handles_signals = threading.current_thread() is threading.main_thread()
        if handles_signals:
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            for plan in plans:
                number = len(self._runs)
                if self._current is not None:
                    await self._current.drain()
                    if plan.fleet.outages:
                        await asyncio.to_thread(wait_until_up, plan.fleet, target)
                if self.interrupted:
                    break
                self._current = LoadRun(
                    plan,
                    target,
                    writers,
                    run_id=f"run-{self._nonce:09}-{number}",
                    number=number,
                    progress=self._progress_of(plan),
                )
                self._runs.append(await self._current.run())
        finally:
            if handles_signals:
                loop.remove_signal_handler(signal.SIGINT)

    def _progress_of(self, plan: RunPlan) -> Callable[[float], None] | None:
        progress = self._progress
        if progress is None:
            return None
        done = sum(_weight(self._file, run.load) for run in self._runs)
        weight = _weight(self._file, plan.load)
        return lambda share: progress((done + weight * share) / self._total)


def prompt_writers(
    file: FleetFile, fleet: Fleet, texts: Mapping[str, Sequence[str]], *, nonce: int = 0
) -> list[PromptWriter]:
    """Return what writes the prompts of each class, for the tokenizer of the expert that the class prefers.

    Args:
        file: of the fleet.
        fleet: one of its fleets, resolved.
        texts: of each class.
        nonce: of the run, see ``PromptWriter``.

    Raises:
        ValueError: a checkpoint has no tokenizer.
    """
    tokenizers: dict[str, Any] = {}
    writers = []
    for index, (name, spec) in enumerate(file.workload.classes.items()):
        expert = fleet.experts[fleet.class_map[index][0] if fleet.class_map[index] else 0].name
        if expert not in tokenizers:
            tokenizers[expert] = load_tokenizer(file.fleets[fleet.name].experts[expert])
        writers.append(
            PromptWriter(texts[name], tokenizers[expert], shared_prefix_tokens=spec.shared_prefix_tokens, nonce=nonce)
        )
    return writers


def _with_duration(file: FleetFile, duration_s: float) -> FleetFile:
    if not duration_s > 0:
        raise ValueError(f"duration_s must be > 0, got {duration_s:g}")
    changes = {"duration_s": duration_s, "requests": None, "requests_per_user": None}
    return file.model_copy(update={"run": file.run.model_copy(update=changes)})


def _weight(file: FleetFile, load: float) -> float:
    """About how long a run takes, in a unit of its own, to tell the time left."""
    if file.run.duration_s is not None or load != load:
        return 1.0
    requests = file.run.requests or 500
    return max(requests / load, file.run.requests_per_user or 4)


def _fleets_to_run(file: FleetFile, fleet: str | None, url: str | None) -> list[str]:
    if fleet is not None:
        if fleet not in file.fleets:
            raise ValueError(f"--fleet {fleet}: the file has no such fleet{did_you_mean(fleet, file.fleets)}")
        return [fleet]
    if url is not None and len(file.fleets) > 1:
        raise ValueError(f"--url: say which fleet answers there with --fleet, one of {', '.join(file.fleets)}")
    return list(file.fleets)
