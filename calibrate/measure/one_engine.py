"""Measuring one real engine: point after point within a budget, every point written before the next begins."""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from calibrate.fit.iteration_fit import TermFit, fit_terms
from calibrate.fit.iteration_observations import TooFewRecordsError, observations
from calibrate.measure.client import PointClient, RequestFailedError
from calibrate.measure.engine_under_test import EngineGoneError, EngineUnderTest, Start
from calibrate.measure.files import MeasuredPoint, MeasurementError, MeasurementFolder, Meta
from calibrate.measure.grid import (
    REFERENCE,
    Candidate,
    Choice,
    Lengths,
    Point,
    candidate,
    candidates,
    closed_points,
    first_design,
    rough_fit,
    target_works,
)
from calibrate.measure.iteration_records import reconstruct, sent_frame
from calibrate.measure.machine import clock_mhz, device_name, temperature_c
from calibrate.measure.measured_profile import graph_sizes
from real.experts.iteration_log import IterationLog
from real.users.prompts import PromptWriter, load_tokenizer, read_corpus
from sim.catalogue import find_gpu, find_model, find_quantization
from sim.profile import ExpertIdentity
from sim.run import program_version
from sim.spec import ExpertSpec

REFERENCE_EVERY_S = 40.0
NOISY = 0.02
"""Standard error of a point's mean decode iteration, as a share of it, above which the point is measured again."""
MOST_TIMES = 3
"""That a point is measured because it is noisy, or one of the first; each time a third of the budget later.

At once would tell little: what slows a machine lasts for seconds, and other such moments come.
"""
CHECK_SHARE = 0.15
"""Of the budget, for closed-loop users kept aside as a check."""
MOST_RESTARTS = 2
LEAST_FREE_BYTES = 2**20
"""Of the disk that the engine logs to: below it a log without iterations is blamed on it."""
WARM_UP = Point(kind="steps", requests=8, prompt_tokens=16, output_tokens=8)

WAITING = "waiting for the engine"
Progress = Callable[[float, str], None]
"""Told the seconds measured so far and what is measured now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a measurement ended.

    Attributes:
        complete: the budget was used.
        reason: why it was not; empty where a part of it was left for another time, too.
    """

    measured: MeasurementFolder
    complete: bool
    reason: str = ""


def measure_expert(
    name: str,
    spec: ExpertSpec,
    *,
    folder: Path,
    lengths: Lengths,
    minutes: float,
    share: float = 1.0,
    start: Start,
    cores: Sequence[int] = (),
    port: int = 8100,
    command: Sequence[str] = (),
    progress: Progress = lambda _seconds, _what: None,
    afterwards: Callable[[EngineUnderTest], None] | None = None,
) -> Outcome:
    """Measure an expert for so many minutes in all, those already in the folder included, or for a share of them.

    The rest may be measured another time; only the last of it has the closed-loop users that are kept aside as a check.
    A lost engine is started again, at most MOST_RESTARTS times; the point it was lost at is measured again. When all is
    measured, ``afterwards`` is called with the engine before it is stopped; it is not called when nothing was left to
    measure.

    Raises:
        EngineGoneError: it did not come up, and nothing has been measured before.
        MeasurementError: the folder is another measurement's, or cannot be read or written.
    """
    measured = MeasurementFolder(folder)
    if measured.meta is not None and measured.meta.complete_minutes >= minutes:
        return Outcome(measured=measured, complete=True)
    budget_s, complete = 60 * minutes, share >= 1
    for attempt in range(MOST_RESTARTS + 1):
        progress(_seconds(measured), f"{name}: {WAITING}")
        try:
            engine = start(name, spec, tuple(cores), port, folder)
        except EngineGoneError as error:
            if measured.meta is None or not measured.meta.points:
                raise
            return Outcome(measured=measured, complete=False, reason=str(error))
        try:
            measured.begin(_meta(spec, engine, lengths, command))
            session = _Session(name, spec, engine, measured, lengths, budget_s, share, progress)
            asyncio.run(session.run())
            if complete:
                measured.note_complete(minutes)
            if afterwards is not None:
                afterwards(engine)
            return Outcome(measured=measured, complete=complete)
        except (RequestFailedError, EngineGoneError) as error:
            reason = str(error)
            if attempt < MOST_RESTARTS:
                measured.note_restart()
        finally:
            engine.stop()
    return Outcome(measured=measured, complete=False, reason=f"{name}: {reason}; lost {MOST_RESTARTS + 1} times")


def _seconds(measured: MeasurementFolder) -> float:
    return 0.0 if measured.meta is None else measured.meta.measured_s


def _meta(spec: ExpertSpec, engine: EngineUnderTest, lengths: Lengths, command: Sequence[str]) -> Meta:
    facts = engine.facts
    gpu = find_gpu(spec.gpu)
    return Meta(
        expert=ExpertIdentity(
            model=find_model(spec.model).name,
            quantization=find_quantization(spec.quantization).name,
            gpu=gpu.name,
            tensor_parallel_size=spec.tensor_parallel_size,
            engine=facts.engine,
            engine_version=facts.version,
        ),
        settings=asdict(facts.settings),
        num_gpu_blocks=facts.num_gpu_blocks,
        device=device_name(gpu=gpu.kind != "cpu"),
        cores=list(facts.cores),
        command=list(command),
        engine_command=list(facts.command),
        program_version=program_version(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        lengths={"prompts": lengths.prompts.tolist(), "outputs": lengths.outputs.tolist()},
    )


class _Session:
    """One engine's share of a measurement."""

    def __init__(
        self,
        name: str,
        spec: ExpertSpec,
        engine: EngineUnderTest,
        measured: MeasurementFolder,
        lengths: Lengths,
        budget_s: float,
        share: float,
        progress: Progress,
    ):
        self._name = name
        self._spec = spec
        self._engine = engine
        self._measured = measured
        self._lengths = lengths
        self._budget_s = budget_s
        self._share = share
        self._progress = progress
        self._log = IterationLog(engine.log)
        self._settings = engine.facts.settings
        meta = measured.meta
        assert meta is not None
        self._graph_sizes = graph_sizes(meta)
        self._on_gpu = find_gpu(spec.gpu).kind != "cpu"

    async def run(self) -> None:
        """Measure until the share of the budget is used."""
        self._log.new_lines()  # those of an earlier start
        texts = [text for of_class in read_corpus().values() for text in of_class]
        writer = PromptWriter(texts, load_tokenizer(self._spec))
        seed = len(self._points()) + 1000 * (self._measured.meta.restarts if self._measured.meta else 0)
        client = PointClient(self._engine.url, self._engine.served_model, writer, self._lengths, seed)
        try:
            await client.measure(WARM_UP, "warm-up")
            self._log.new_lines()
            await self._measure_all(client)
        finally:
            client.close()

    def _points(self) -> tuple[MeasuredPoint, ...]:
        meta = self._measured.meta
        assert meta is not None
        return meta.points

    async def _measure_all(self, client: PointClient) -> None:
        known = candidates(self._settings, self._lengths)
        grid_s = self._budget_s * self._share * (1 - CHECK_SHARE)
        whole_s = self._budget_s * (1 - CHECK_SHARE)
        while (spent_s := _seconds(self._measured)) < grid_s:
            since = [point.started_s for point in self._points() if point.reference]
            if not since or spent_s - since[-1] > REFERENCE_EVERY_S:
                await self._measure(client, REFERENCE, reference=True)
                continue
            again = self._again(known, spent_s, grid_s, whole_s)
            if again is not None:
                await self._measure(client, again)
                continue
            chosen = self._choose(known, grid_s - spent_s)
            if chosen is None:
                break
            await self._measure(client, chosen.point)
        if self._share >= 1:
            await self._check(client)

    async def _check(self, client: PointClient) -> None:
        """Closed-loop users, as many requests as the time left allows."""
        done = sum(point.label.startswith("closed") for point in self._points())
        points = closed_points(self._settings, self._lengths)[done:]
        fit, _ = self._fit()
        for number, point in enumerate(points):
            left_s = (self._budget_s - _seconds(self._measured)) / (len(points) - number)
            context = self._lengths.mean_context
            outputs, prompts = float(self._lengths.outputs.mean()), float(self._lengths.prompts.mean())
            decode = np.array([[0, 0, 0, 0, point.users, point.users * context]], dtype=np.float64)
            prefill = np.array([[prompts, 1, prompts**2 / 2, prompts, 0, 0]], dtype=np.float64)
            request_s = float(fit.predict_s(decode)[0] * outputs / point.users + fit.predict_s(prefill)[0])
            users = int(max(1, min(point.users, left_s / request_s)))
            requests = int(max(users, min(8 * users, left_s / request_s)))
            await self._measure(client, Point(kind="closed", requests=requests, users=users))

    async def _measure(self, client: PointClient, point: Point, *, reference: bool = False) -> None:
        points = self._points()
        name = "reference" if reference else point.name
        label = f"{name}#{sum(each.label.partition('#')[0] == name for each in points) + 1}"
        started_s = _seconds(self._measured)
        self._progress(started_s, f"{self._name}: {name}")
        begin_s, cpu_before_s = time.monotonic(), self._engine.front_end_cpu_s()
        try:
            sent = await client.measure(point, label)
        except RequestFailedError as error:
            if not self._engine.is_running():
                raise EngineGoneError(f"the engine ended during {name!r} ({error}); log: {self._engine.log}") from error
            raise
        cpu_after_s = self._engine.front_end_cpu_s()
        records = reconstruct(self._log.new_lines(), sent, self._settings, label)
        cpu_s = None if cpu_before_s is None or cpu_after_s is None else cpu_after_s - cpu_before_s
        self._measured.add(
            MeasuredPoint(
                label=label,
                started_s=started_s,
                took_s=time.monotonic() - begin_s,
                reference=reference,
                requests=len(sent),
                prompt_tokens=sum(request.prompt_tokens for request in sent),
                output_tokens=sum(request.output_tokens for request in sent),
                iterations=len(records),
                matched=float(records["matched"].mean()) if len(records) else 0.0,
                front_end_cpu_s=cpu_s,
                clock_mhz=clock_mhz(gpu=self._on_gpu),
                temperature_c=temperature_c(gpu=self._on_gpu),
            ),
            records,
            sent_frame(sent),
        )
        if not len(records):
            raise MeasurementError(self._why_no_iterations())

    def _why_no_iterations(self) -> str:
        log = self._engine.log
        if shutil.disk_usage(log.parent).free < LEAST_FREE_BYTES:
            return (
                f"{log} cannot grow, its disk is full; the points before are kept: make room and give the same command "
                "again"
            )
        return (
            f"{log} has no iterations: the engine must run with --enable-logging-iteration-details and the logging "
            "configuration of real.experts.iteration_log"
        )

    def _fit(self) -> tuple[TermFit, float]:
        """The fit so far and the jitter of log lines, or rough ones."""
        rows = self._measured.iterations
        try:
            seen = observations(
                rows[~rows["point"].str.startswith("closed")].reset_index(drop=True),
                asynchronous=self._settings.async_scheduling,
            )
        except TooFewRecordsError:
            return rough_fit(), 3e-3
        return fit_terms(seen, graph_sizes=self._graph_sizes), seen.jitter_s

    def _choose(self, known: list[Candidate], seconds_left: float) -> Candidate | None:
        fit, jitter_s = self._fit()
        choice = Choice(fit, target_works(self._settings, self._lengths), jitter_s)
        by_name = {each.point.name: each for each in known}
        by_name |= {p.name: candidate(p, self._settings) for p in first_design(self._settings, self._lengths)}
        for point in self._points():
            told = by_name.get(point.label.partition("#")[0])
            if told is not None:
                choice.learn(told)
        return choice.best(known, seconds_left)

    def _again(self, known: Sequence[Candidate], spent_s: float, grid_s: float, whole_s: float) -> Point | None:
        """One of the first points that is due, or else the earliest of the others that is noisy and due."""
        first = first_design(self._settings, self._lengths)
        times = Counter(point.label.partition("#")[0] for point in self._points())
        last = {point.label.partition("#")[0]: point for point in self._points()}

        def is_due(name: str) -> bool:
            if not times[name]:
                return True
            later, fits = spent_s - last[name].started_s >= whole_s / MOST_TIMES, spent_s + last[name].took_s <= grid_s
            return times[name] < MOST_TIMES and later and fits

        for point in first:
            if is_due(point.name):
                return point
        others = {each.point.name: each.point for each in known}
        due = (others[name] for name in last if name in others and is_due(name) and self._is_noisy(name))
        return next(due, None)

    def _is_noisy(self, name: str) -> bool:
        """Whether a point's mean is not yet known well enough."""
        rows = self._measured.iterations
        mine = rows[rows["point"].str.startswith(f"{name}#") & rows["matched"] & (rows["prefill_chunks"] == 0)]
        return standard_error(mine) > NOISY


def standard_error(decodes: pd.DataFrame) -> float:
    """Return the standard error of the mean cycle of like iterations, as a share of it; 0 with fewer than two."""
    largest = decodes[decodes["decodes"] == decodes["decodes"].max()]["cycle_s"].dropna()
    return float(largest.std(ddof=1) / len(largest) ** 0.5 / largest.mean()) if len(largest) > 1 else 0.0
