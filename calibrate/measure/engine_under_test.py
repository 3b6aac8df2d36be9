"""A real engine while it is measured: started as ``serve`` would start it, with its log and its processes in view."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from calibrate.measure.machine import command_line, cpu_seconds, processes_under
from sim.fleet import EngineSettings
from sim.spec import EngineSpec, ExpertSpec

if TYPE_CHECKING:
    from real.experts.expert_server import ExpertServer
    from real.serving.fleet import RunningFleet

AGAIN_S = 900.0
"""How long a served engine that has died may take to be there again: as long as any start may take."""


class EngineGoneError(RuntimeError):
    """The engine did not come up, or is no more; the message says which, why, and where its log is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a running engine resolved.

    Attributes:
        version: e.g. "vLLM 0.32.0".
        settings: of its scheduler.
        engine: the settings as a fleet file would state them.
        num_gpu_blocks: its null block included.
        cores: it is confined to; none on a GPU.
        command: that started it.
    """

    version: str
    settings: EngineSettings
    engine: EngineSpec
    num_gpu_blocks: int
    cores: tuple[int, ...]
    command: tuple[str, ...]


class EngineUnderTest(Protocol):
    """A running engine."""

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    @property
    def served_model(self) -> str:
        """The name it answers to."""
        ...

    @property
    def log(self) -> Path:
        """Its log, with iterations in microseconds."""
        ...

    @property
    def facts(self) -> EngineFacts:
        """What it resolved."""
        ...

    def front_end_cpu_s(self) -> float | None:
        """CPU seconds of its API server process so far."""
        ...

    def is_running(self) -> bool:
        """Whether its process is there."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


Start = Callable[[str, ExpertSpec, tuple[int, ...], int, Path], EngineUnderTest]
"""Starts an expert by name, spec, cores (empty: any) and port, with its log in a folder, and waits until it answers.
Raises EngineGoneError."""


class RunningExpert:
    """A ready server of ``real.experts.expert_server``; fulfils EngineUnderTest."""

    def __init__(self, server: "ExpertServer", stop: Callable[[], None]):
        """Take a server that has reported.

        Args:
            server: ready.
            stop: ends it, or not, if it is somebody else's.
        """
        report, plan = server.report, server.plan
        assert report is not None
        self._server = server
        self._stop = stop
        settings = plan.settings
        found = {name: value for name in _SETTINGS if (value := getattr(report, name)) is not None}
        if report.num_gpu_blocks is not None:
            found["num_kv_blocks"] = report.num_gpu_blocks - 1  # one is the engine's null block
        settings = replace(settings, **found)
        self._facts = EngineFacts(
            version=f"vLLM {report.version}",
            settings=settings,
            engine=plan.spec.engine.model_copy(
                update={
                    "max_num_seqs": settings.max_num_seqs,
                    "max_num_batched_tokens": settings.max_num_batched_tokens,
                    "max_model_len": settings.max_model_len,
                    "block_size": settings.block_size,
                    "num_gpu_blocks_override": settings.num_kv_blocks + 1,
                    "enable_prefix_caching": settings.enable_prefix_caching,
                    "async_scheduling": settings.async_scheduling,
                    "enforce_eager": plan.spec.engine.enforce_eager
                    if report.enforce_eager is None
                    else report.enforce_eager,
                }
            ),
            num_gpu_blocks=settings.num_kv_blocks + 1,
            cores=plan.placement.cores,
            command=tuple(server.command),
        )
        self._front_end = _front_end_of(server.pid)

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._server.url

    @property
    def served_model(self) -> str:
        """The expert's name."""
        return self._server.plan.expert

    @property
    def log(self) -> Path:
        """Its log; iterations of earlier starts come first."""
        return self._server.log

    @property
    def facts(self) -> EngineFacts:
        """What it resolved."""
        return self._facts

    def front_end_cpu_s(self) -> float | None:
        """CPU seconds of its API server process so far; None where the system does not tell."""
        return None if self._front_end is None else cpu_seconds(self._front_end)

    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._server.is_running

    def stop(self) -> None:
        """End it and all it started, unless it is somebody else's."""
        self._stop()


def start_expert(name: str, spec: ExpertSpec, cores: tuple[int, ...], port: int, folder: Path) -> EngineUnderTest:
    """Start a server and wait until it answers: a ``Start``.

    Raises:
        EngineGoneError: it did not come up, its port is taken, or its checkpoint is missing or another's.
    """
    from real.experts.checkpoints import find_checkpoint
    from real.experts.cores import Placement, place_replicas
    from real.experts.expert_server import EngineFailedError, ExpertServer, plan_replica
    from real.processes.guarded_process import LifeLine

    life = LifeLine()
    try:
        placement = Placement(cores=cores) if cores else place_replicas({name: spec})[0][name][0]
        plan = plan_replica(name, 0, spec, checkpoint=find_checkpoint(name, spec), placement=placement, port=port)
        server = ExpertServer(plan, logs=folder, life=life)
        server.start()
        server.wait_until_ready()
    except (EngineFailedError, ValueError) as error:
        life.close()
        raise EngineGoneError(str(error)) from error
    except BaseException:
        life.close()
        raise

    def stop() -> None:
        try:
            server.stop()
        finally:
            life.close()

    return RunningExpert(server, stop)


def served_by(fleet: "RunningFleet") -> Start:
    """Return a ``Start`` that starts nothing: it hands out the first replica of an expert of a fleet that is served.

    One that has died is waited for: whoever serves the fleet starts it again.
    """

    def find(name: str, spec: ExpertSpec, cores: tuple[int, ...], port: int, folder: Path) -> EngineUnderTest:
        server = next(each for each in fleet.servers if each.plan.spec == spec)
        watched = next(each for each in fleet.supervisor.experts if each.service is server)
        deadline_s = time.monotonic() + AGAIN_S
        while watched.state != "ready" or not _answers(server):
            if watched.state == "given up" or time.monotonic() > deadline_s:
                raise EngineGoneError(f"{name}: {watched.reason or 'it does not come up again'}")
            time.sleep(0.2)
        return RunningExpert(server, lambda: None)

    return find


def _answers(server: "ExpertServer") -> bool:
    """Whether it does now; a server's death is seen here before whoever watches it has seen it."""
    from real.experts.expert_server import EngineFailedError

    try:
        return server.is_ready()
    except EngineFailedError:
        return False


_SETTINGS = (
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
    "async_scheduling",
)


def _front_end_of(pid: int | None) -> int | None:
    """The API server among a server's processes: the first below the guard; engine and workers are its children."""
    if pid is None:
        return None
    for each in processes_under(pid):
        words = command_line(each)
        if "api_server" in words and "real.processes.guard" not in words:
            return each
    return None
