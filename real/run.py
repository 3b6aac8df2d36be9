"""``run``: what ``simulate`` predicts, measured: real users against a real fleet, and the same figures of it."""

import asyncio
import os
import resource
import secrets
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

from real.engine_metrics import ReplicaUrl, ask_json, engine_version
from real.load_client import patience
from real.load_run import LoadRun, Target
from real.prompts import PromptWriter, load_tokenizer, read_corpus, texts_of_classes
from real.serving import read_state, serving
from sim.feasibility import check_feasible
from sim.fleet import Fleet
from sim.mistakes import did_you_mean
from sim.records import RunRecord
from sim.resolve import resolve_fleet
from sim.result import Measured, Result
from sim.run import Progress, loads, program_version, with_changes
from sim.simulation import RunPlan
from sim.spec import ClosedLoop, FleetFile
from sim.traces import read_workload_data
from sim.traffic import WorkloadData

OPEN_FILES_SPARE = 256
MAX_CONNECTIONS = 28_000
"""Ports that one address has for outgoing connections, as Linux comes."""


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
            with _serving(file, name, url, replica_urls, logs, tell) as target:
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
        self._started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._fleets = {name: resolve_fleet(file, name) for name in file.fleets}
        self._weights = [_weight(file, load) for load in loads(file.workload)] * file.run.replications
        self._total = sum(self._weights) * len(file.fleets)
        self._runs: list[RunRecord] = []
        self._urls: dict[str, str] = {}
        self._engines: dict[str, dict[str, str]] = {}
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
        self._urls[name] = target.url
        self._engines[name] = _engines(fleet, target)
        writers = self._writers(fleet)
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
        _in_event_loop(lambda: self._run_all(plans, target, writers))

    async def _run_all(self, plans: Sequence[RunPlan], target: Target, writers: list[PromptWriter]) -> None:
        current: LoadRun | None = None

        def interrupt() -> None:
            self.interrupted = True
            if current is not None:
                current.interrupt()

        loop = asyncio.get_running_loop()
        handles_signals = threading.current_thread() is threading.main_thread()
        if handles_signals:
            loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            for plan in plans:
                number = len(self._runs)
                if current is not None:
                    await current.drain()
                if self.interrupted:
                    break
                current = LoadRun(
                    plan,
                    target,
                    writers,
                    run_id=f"run-{self._nonce:09}-{number}",
                    number=number,
                    progress=self._progress_of(plan),
                )
                self._runs.append(await current.run())
        finally:
            if handles_signals:
                loop.remove_signal_handler(signal.SIGINT)

    def _writers(self, fleet: Fleet) -> list[PromptWriter]:
        """One a class, for the tokenizer of the expert that the class prefers."""
        tokenizers: dict[str, Any] = {}
        writers = []
        for index, (name, spec) in enumerate(self._file.workload.classes.items()):
            expert = fleet.experts[fleet.class_map[index][0] if fleet.class_map[index] else 0].name
            if expert not in tokenizers:
                tokenizers[expert] = load_tokenizer(self._file.fleets[fleet.name].experts[expert])
            writers.append(
                PromptWriter(
                    self._texts[name],
                    tokenizers[expert],
                    shared_prefix_tokens=spec.shared_prefix_tokens,
                    nonce=self._nonce,
                )
            )
        return writers

    def _progress_of(self, plan: RunPlan) -> Callable[[float], None] | None:
        progress = self._progress
        if progress is None:
            return None
        done = sum(_weight(self._file, run.load) for run in self._runs)
        weight = _weight(self._file, plan.load)
        return lambda share: progress((done + weight * share) / self._total)


def _in_event_loop(work: Callable[[], Any]) -> None:
    """Run a coroutine to its end; in a thread of its own where this one has an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        uvloop.run(work())
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: uvloop.run(work())).result()


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


# ---------------------------------------------------------------------------------------------------------- the target


@contextmanager
def _serving(
    file: FleetFile,
    name: str,
    url: str | None,
    replica_urls: Mapping[str, Sequence[str]] | None,
    logs: Path,
    tell: Callable[[str], None] | None,
) -> Iterator[Target]:
    """Yield where to send: the given address, or a fleet that is started for this and stopped afterwards."""
    if url is not None:
        yield _target(file, name, url, _noted_replicas(name, url, logs) if replica_urls is None else replica_urls)
        return
    with serving(file, name, logs=logs, tell=tell) as served:
        yield _target(
            file, name, served.url, _by_expert((each.expert, each.replica, each.url) for each in served.replicas)
        )


def _noted_replicas(name: str, url: str, logs: Path) -> dict[str, list[str]]:
    """Where the replicas of the fleet at ``url`` listen, if it is the one that writes its state there."""
    state = read_state(logs)
    if state is None or state["fleet"] != name or urlsplit(state["url"]).netloc != urlsplit(url).netloc:
        return {}
    return _by_expert((each["expert"], each["replica"], each["url"]) for each in state["replicas"])


def _by_expert(replicas: Iterable[tuple[str, int, str]]) -> dict[str, list[str]]:
    urls: dict[str, list[str]] = {}
    for expert, _, url in sorted(replicas):
        urls.setdefault(expert, []).append(url)
    return urls


def _target(file: FleetFile, name: str, url: str, replica_urls: Mapping[str, Sequence[str]]) -> Target:
    spec = file.fleets[name]
    experts = list(spec.experts)
    unknown = [expert for expert in replica_urls if expert not in spec.experts]
    if unknown:
        raise ValueError(f"--replica-url {unknown[0]}: no such expert{did_you_mean(unknown[0], experts)}")
    if spec.router is None and not replica_urls:
        replica_urls = {experts[0]: [url]}
    key = (os.environ.get(file.serve.api_key_env or "") or "").split(",")[0].strip() or None
    return Target(
        url=url,
        model=_model_name(url, key, name, experts, routed=spec.router is not None),
        patience=patience(file.serve.timeouts),
        replicas=tuple(
            ReplicaUrl(index, place, each)
            for index, expert in enumerate(experts)
            for place, each in enumerate(replica_urls.get(expert, ()))
        ),
        api_key=key,
        max_in_flight=_max_connections(file),
    )


def _model_name(url: str, key: str | None, fleet: str, experts: Sequence[str], *, routed: bool) -> str:
    """Ask the server what it serves and choose the name that lets a router route, or the expert's own.

    Raises:
        ValueError: nothing answers.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url {url}: expected a URL such as http://127.0.0.1:8080")
    try:
        answer = ask_json(url.rstrip("/").removesuffix("/v1") + "/v1/models", key)
        served = [str(each["id"]) for each in answer["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--url {url}: no OpenAI-compatible server answers there ({error}); start one with expert-router serve, or "
            "leave --url out to have the fleet started"
        ) from None
    wanted = [each for each in ("expert-router", fleet) if each not in experts] if routed else experts[:1]
    return next((each for each in wanted if each in served), served[0] if served else wanted[0])


def _engines(fleet: Fleet, target: Target) -> dict[str, str]:
    """Engine and version of each expert, as its first known replica tells."""
    told = {expert.name: "engine unknown" for expert in fleet.experts}
    for replica in reversed(target.replicas):
        told[fleet.experts[replica.expert_index].name] = engine_version(replica.url)
    return told


def _max_connections(file: FleetFile) -> int:
    """Allow this process as many open files as the system lets it, and return how many connections that makes.

    Raises:
        ValueError: fewer than the users of the highest load.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, hard - OPEN_FILES_SPARE)
    if isinstance(file.workload.load, ClosedLoop) and loads(file.workload)[-1] > most:
        raise ValueError(
            f"{loads(file.workload)[-1]:,.0f} users need as many connections and this process may have {most:,}; raise "
            "the limit with ulimit -n, or ask for fewer users"
        )
    return most
