"""One real vLLM server, OpenAI-compatible, for one replica of one expert of a fleet file."""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from zlib import crc32

from real.experts.checkpoints import Checkpoint
from real.experts.cores import Placement, runs_on_cpu, why_not_on_this_cpu
from real.experts.engine_log import EngineReport, diagnose, has_failed, read_report, stage
from real.experts.iteration_log import LOGGING_CONFIG_VARIABLE, write_logging_config
from real.loopback import LOOPBACK
from real.processes.guarded_process import GuardedProcess, LifeLine, child_environment
from real.processes.ports import group_listens, port_is_free
from sim.catalogue import find_quantization
from sim.fleet import EngineSettings
from sim.resolve import budget_of, engine_settings
from sim.spec import ExpertSpec

START_LIMIT_S = 900.0
"""How long an engine may take until it answers: a 70B model from a slow disk takes minutes."""

STOP_GRACE_S = 15.0
"""How long an engine may take to end when asked."""

_POLL_S = 0.25

_LOGGING_FILE = "vllm-logging.json"

_FAILED_GRACE_S = 10.0  # in which an API server whose engine failed ends of itself, unless it hangs

Progress = Callable[[str], None]
"""Told the stage of a start, in a few words, when it changes."""


class EngineFailedError(RuntimeError):
    """An engine ended, or did not answer in time; says which, why, and where its log is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAddress:
    """Where one replica listens."""

    expert: str
    replica: int
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One replica, ready to be started.

    Attributes:
        expert: its name in the fleet file, under which it serves.
        settings: what the simulation resolved for it.
        log_iterations: the engine logs every iteration, as calibration needs it.
    """

    expert: str
    replica: int
    spec: ExpertSpec
    settings: EngineSettings
    checkpoint: Checkpoint
    placement: Placement
    port: int
    log_iterations: bool = True

    @property
    def name(self) -> str:
        """``expert/replica``."""
        return f"{self.expert}/{self.replica}"

    @property
    def address(self) -> ReplicaAddress:
        """Where it will listen."""
        return ReplicaAddress(expert=self.expert, replica=self.replica, url=f"http://{LOOPBACK}:{self.port}")


def plan_replica(
    expert: str,
    replica: int,
    spec: ExpertSpec,
    *,
    checkpoint: Checkpoint,
    placement: Placement,
    port: int,
    log_iterations: bool = True,
) -> ReplicaPlan:
    """Return the plan of one replica, its settings resolved as the simulation resolves them.

    Raises:
        ValueError: the expert leaves no room for a KV cache, or its format does not run here.
    """
    if runs_on_cpu(spec):
        reason = why_not_on_this_cpu(find_quantization(spec.quantization).name)
        if reason is not None:
            raise ValueError(f"expert {expert!r}: {reason}")
    return ReplicaPlan(
        expert=expert,
        replica=replica,
        spec=spec,
        settings=engine_settings(spec),
        checkpoint=checkpoint,
        placement=placement,
        port=port,
        log_iterations=log_iterations,
    )


def server_command(plan: ReplicaPlan) -> list[str]:
    """Return the command line of a replica's server. No engine setting is left to vLLM's defaults."""
    spec, settings = plan.spec, plan.settings
    values: dict[str, object] = {
        "model": plan.checkpoint.place,
        "served-model-name": plan.expert,
        "host": LOOPBACK,
        "port": plan.port,
        "load-format": "dummy" if plan.checkpoint.random_weights else "auto",
        "dtype": spec.engine.dtype,
        "tensor-parallel-size": spec.tensor_parallel_size,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "max-num-batched-tokens": settings.max_num_batched_tokens,
        "block-size": settings.block_size,
        "kv-cache-dtype": spec.engine.kv_cache_dtype,
        "generation-config": spec.engine.generation_config,
    }
    if runs_on_cpu(spec):
        # Told neither, the CPU backend takes nearly all memory of the machine for one engine's cache.
        values["num-gpu-blocks-override"] = settings.num_kv_blocks + 1
        values["kv-cache-memory-bytes"] = (settings.num_kv_blocks + 1) * budget_of(spec).kv_block_bytes
    else:
        values["gpu-memory-utilization"] = spec.engine.gpu_memory_utilization
        if spec.engine.num_gpu_blocks_override is not None:
            values["num-gpu-blocks-override"] = spec.engine.num_gpu_blocks_override
    switches = {
        "enable-prefix-caching": settings.enable_prefix_caching,
        "scheduler-reserve-full-isl": settings.scheduler_reserve_full_isl,
        "async-scheduling": settings.async_scheduling,
        "enforce-eager": spec.engine.enforce_eager,
        "enable-logging-iteration-details": plan.log_iterations,
    }
    # The module rather than the command `vllm`, which the CPU wheel cannot run (it looks for the package "vllm").
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command += [f"--{name}" if on else f"--no-{name}" for name, on in switches.items()]
    return [*command, "--disable-uvicorn-access-log"]


def server_environment(plan: ReplicaPlan) -> dict[str, str]:
    """Return the environment of a replica's server: its cores or GPUs, and nothing asked of the network."""
    changes = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    if plan.checkpoint.is_local:
        changes["HF_HUB_OFFLINE"] = "1"
    if runs_on_cpu(plan.spec):
        changes["VLLM_CPU_OMP_THREADS_BIND"] = _core_groups(plan.placement.cores, plan.spec.tensor_parallel_size)
    else:
        changes["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, plan.placement.gpus))
    environment = child_environment(changes)
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would replace kv-cache-memory-bytes
    environment.pop("VLLM_RPC_BASE_PATH", None)  # its sockets belong into its temporary folder, the default
    return environment


def _core_groups(cores: tuple[int, ...], ranks: int) -> str:
    """Cores of each tensor-parallel rank, as vLLM takes them: ``0,1|2,3``."""
    each = max(1, len(cores) // ranks)
    groups = [[cores[(rank * each + place) % len(cores)] for place in range(each)] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


class ExpertServer:
    """A vLLM server of one replica: started, watched, asked for its settings, stopped.

    Attributes:
        plan: what it runs.
        started_s: monotonic time of the latest start; None before.
        report: what the engine resolved; None until it has answered.
    """

    def __init__(self, plan: ReplicaPlan, *, logs: Path, life: LifeLine) -> None:
        """Nothing is started yet.

        Args:
            plan: what to run.
            logs: folder of ``EXPERT-REPLICA.log``.
            life: the server ends with it.
        """
        self.plan = plan
        self.started_s: float | None = None
        self.report: EngineReport | None = None
        self._failed_s: float | None = None
        environment = server_environment(plan)
        if plan.log_iterations:
            environment[LOGGING_CONFIG_VARIABLE] = str((logs / _LOGGING_FILE).resolve())
        label = re.sub(r"[^\w.-]", "_", plan.expert)  # names may hold what file names must not
        if label != plan.expert:
            label += f"-{crc32(plan.expert.encode()):08x}"
        self._process = GuardedProcess(
            server_command(plan),
            log=logs / f"{label}-{plan.replica}.log",
            life=life,
            environment=environment,
            cores=plan.placement.cores,
        )

    @property
    def name(self) -> str:
        """``expert/replica``."""
        return self.plan.name

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.plan.address.url

    @property
    def command(self) -> list[str]:
        """The command line of the server."""
        return self._process.command

    @property
    def log(self) -> Path:
        """Its log file, which every start appends to."""
        return self._process.log

    @property
    def pid(self) -> int | None:
        """The process group of the server and all it starts; None before the first start."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether its process is there, ready or not."""
        return self._process.is_running

    def start(self) -> None:
        """Start the server without waiting for it.

        Raises:
            EngineFailedError: its port is taken.
        """
        if not port_is_free(self.plan.port):
            raise EngineFailedError(
                f"{self.name}: port {self.plan.port} is in use; set serve.expert_port to another, or end what uses it"
            )
        self.report = None
        self._failed_s = None
        if self.plan.log_iterations:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            write_logging_config(self.log.parent / _LOGGING_FILE)
        self.started_s = time.monotonic()
        self._process.start()

    def is_ready(self) -> bool:
        """Whether it, and nobody else on its port, answers; the first time its settings are read back.

        Raises:
            EngineFailedError: it has ended.
        """
        if self.report is None and self._hangs_after_failure():
            self.stop(0)
        status = self._process.exit_status
        if status is not None:
            reason = diagnose(self._process.log_text(), status)
            raise EngineFailedError(f"{self.name}: {reason}; log: {self.log}")
        try:
            if _get(self.plan.port, "/health") is None or not group_listens(self._process.pid, self.plan.port):
                return False
            if self.report is None:
                self.report = self._read_report()
        except (OSError, HTTPException):
            return False
        return True

    def wait_until_ready(self, limit_s: float = START_LIMIT_S, progress: Progress | None = None) -> EngineReport:
        """Wait until it answers, and return what it resolved.

        Raises:
            EngineFailedError: it ended, or took longer than ``limit_s``.
        """
        assert self.started_s is not None
        told = ""
        while not self.is_ready():
            if time.monotonic() - self.started_s > limit_s:
                raise EngineFailedError(
                    f"{self.name}: no answer after {limit_s:g} s (it was {self.stage() or 'starting'}); log: {self.log}"
                )
            now = self.stage()
            if progress is not None and now != told:
                progress(now)
            told = now
            time.sleep(_POLL_S)
        assert self.report is not None
        return self.report

    def stage(self) -> str:
        """How far the start is, in a few words."""
        return stage(self._process.log_text())

    def terminate(self) -> None:
        """Ask it to end, without waiting."""
        self._process.terminate()

    def kill(self) -> None:
        """Let it die, as in an outage (SIGKILL), without waiting."""
        self._process.kill()

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End it and everything it started."""
        self._process.stop(grace_s)

    def differences(self) -> list[str]:
        """In what the running engine differs from what the simulation resolved; one line each."""
        assert self.report is not None
        settings = self.plan.settings
        expected: Mapping[str, object] = {
            "num_gpu_blocks": settings.num_kv_blocks + 1,
            "block_size": settings.block_size,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "enable_prefix_caching": settings.enable_prefix_caching,
            "async_scheduling": settings.async_scheduling,
            "enforce_eager": self.plan.spec.engine.enforce_eager,
        }
        lines = []
        for name, value in expected.items():
            found = getattr(self.report, name)
            if found is not None and found != value:
                lines.append(f"{self.name}: the engine has {name} {found}, the simulation {value}")
        return lines

    def _hangs_after_failure(self) -> bool:
        """Whether the engine has failed to start and its API server, which ought to end then, has not."""
        if not self.is_running or not has_failed(self._process.log_text()):
            return False
        self._failed_s = self._failed_s or time.monotonic()
        return time.monotonic() - self._failed_s > _FAILED_GRACE_S

    def _read_report(self) -> EngineReport:
        version = json.loads(_get(self.plan.port, "/version") or "{}").get("version")
        listed = json.loads(_get(self.plan.port, "/v1/models") or "{}").get("data") or [{}]
        return read_report(
            self._process.log_text(),
            _get(self.plan.port, "/metrics") or "",
            version=version,
            max_model_len=listed[0].get("max_model_len"),
        )


def _get(port: int, path: str, timeout_s: float = 5.0) -> str | None:
    """The body of a loopback answer; None unless its status is 200."""
    connection = HTTPConnection(LOOPBACK, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        return body if response.status == 200 else None
    finally:
        connection.close()
