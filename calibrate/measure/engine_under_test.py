"""A real engine while it is measured: started as ``serve`` would start it, with its log and its processes in view."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from calibrate.measure.machine import command_line, cpu_seconds, processes_under
from sim.fleet import EngineSettings
from sim.spec import EngineSpec, ExpertSpec


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
    """A server that ``real.experts.expert_server`` started; fulfils EngineUnderTest."""

    def __init__(self, name: str, spec: ExpertSpec, cores: tuple[int, ...], port: int, folder: Path):
        """Start it and wait until it answers.

        Raises:
            EngineGoneError: it did not come up, its port is taken, or its checkpoint is missing or another's.
        """
        from real.experts.checkpoints import find_checkpoint
        from real.experts.cores import Placement, place_replicas
        from real.experts.expert_server import EngineFailedError, ExpertServer, plan_replica
        from real.processes.guarded_process import LifeLine

        self._life = LifeLine()
        try:
            placement = Placement(cores=cores) if cores else place_replicas({name: spec})[0][name][0]
            plan = plan_replica(name, 0, spec, checkpoint=find_checkpoint(name, spec), placement=placement, port=port)
            self._server = ExpertServer(plan, logs=folder, life=self._life)
            self._server.start()
            report = self._server.wait_until_ready()
        except (EngineFailedError, ValueError) as error:
            self._life.close()
            raise EngineGoneError(str(error)) from error
        except BaseException:
            self._life.close()
            raise
        settings = plan.settings
        found = {name: value for name in _SETTINGS if (value := getattr(report, name)) is not None}
        if report.num_gpu_blocks is not None:
            found["num_kv_blocks"] = report.num_gpu_blocks - 1  # one is the engine's null block
        settings = replace(settings, **found)
        self._facts = EngineFacts(
            version=f"vLLM {report.version}",
            settings=settings,
            engine=spec.engine.model_copy(
                update={
                    "max_num_seqs": settings.max_num_seqs,
                    "max_num_batched_tokens": settings.max_num_batched_tokens,
                    "max_model_len": settings.max_model_len,
                    "block_size": settings.block_size,
                    "num_gpu_blocks_override": settings.num_kv_blocks + 1,
                    "enable_prefix_caching": settings.enable_prefix_caching,
                    "async_scheduling": settings.async_scheduling,
                    "enforce_eager": spec.engine.enforce_eager
                    if report.enforce_eager is None
                    else report.enforce_eager,
                }
            ),
            num_gpu_blocks=settings.num_kv_blocks + 1,
            cores=placement.cores,
            command=tuple(self._server.command),
        )
        self._front_end = _front_end_of(self._server.pid)

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
        """End it and all it started."""
        try:
            self._server.stop()
        finally:
            self._life.close()


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
