"""A fleet file's fleet, running for real on this machine: vLLM servers, and the gateway in front of them.

``with serving(file, "main", logs="logs") as fleet: print(fleet.url)``
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from real.experts.checkpoints import Checkpoint, find_checkpoint
from real.experts.cores import memory_warning, only_cpu_build, place_replicas, runs_on_cpu, usable_cores
from real.experts.expert_server import (
    START_LIMIT_S,
    EngineFailedError,
    ExpertServer,
    ReplicaAddress,
    ReplicaPlan,
    plan_replica,
)
from real.gateway.config import gateway_config
from real.loopback import LOOPBACK
from real.processes.guarded_process import LifeLine
from real.processes.ports import PortClaims, port_is_free
from real.router.classifier import load_classifier
from real.serving.gateway_process import GatewayProcess
from real.serving.supervisor import Supervisor, Tell
from sim.feasibility import check_feasible
from sim.fleet_file import FleetFileError
from sim.mistakes import did_you_mean
from sim.resolve import routes_by_class
from sim.spec import FleetFile

STATE_FILE = "fleet.json"
"""In the folder of logs: where a running fleet listens, and its processes; rewritten whenever one comes or goes."""

GATEWAY_FILE = "gateway.json"
"""In the same folder: what the gateway is told, also when it is started again."""

REQUEST_LOG = "requests.jsonl"
"""In the same folder, if wanted: one line a request of what became of it at the gateway."""

DEFAULT_LOGS = Path("logs")

LAST_PORT = 65535

WARNING = "warning: "
"""Begins a line told of what the user ought to know."""


class RunningFleet:
    """A fleet that is being served.

    Attributes:
        file: the fleet file.
        name: of the fleet in it.
        url: where users send to: the gateway, or the one expert of a fleet without a router.
        logs: folder of the log files and the state file.
        servers: the replicas, in the file's order.
        checkpoints: of each expert.
        warnings: what the user ought to know, one line each.
    """

    def __init__(
        self,
        file: FleetFile,
        name: str,
        *,
        logs: Path,
        tell: Tell | None = None,
        log_iterations: bool = True,
        log_requests: bool = False,
        gateway: bool = True,
    ) -> None:
        """Plan everything and start nothing.

        Args:
            file: from ``load_fleet``.
            name: of one of its fleets.
            logs: folder to write into.
            tell: told in one line what happens.
            log_iterations: engines log every iteration.
            log_requests: the gateway writes down what became of each request.
            gateway: False leaves it out; the experts are then talked to directly.

        Raises:
            FleetFileError: the file cannot work, here or at all.
        """
        check_feasible(file)
        if name not in file.fleets:
            raise FleetFileError([f"no fleet {name!r} in the file{did_you_mean(name, file.fleets)}"])
        self.file, self.name, self.logs = file, name, logs.resolve()
        self._tell = tell or (lambda line: None)
        spec = file.fleets[name]
        has_gateway = spec.router is not None and gateway
        try:
            if has_gateway and routes_by_class(spec) and len(file.workload.classes) > 1:
                # What the gateway would only find wrong once the engines have started.
                load_classifier(file.serve.classifier, list(file.workload.classes))
            self.plans, self.checkpoints, self.warnings = _plan(file, name, log_iterations)
            self._ports = _ports(file, self.plans, has_gateway=has_gateway)
            request_log = str(self.logs / REQUEST_LOG) if log_requests else None
            self._config = (
                gateway_config(file, name, self.replica_urls, request_log=request_log) if has_gateway else None
            )
        except ValidationError as error:
            raise FleetFileError([found["msg"] for found in error.errors(include_url=False)]) from None
        except ValueError as error:
            raise FleetFileError([str(error)]) from None
        self.logs.mkdir(parents=True, exist_ok=True)
        self._life = LifeLine()
        self._claims = PortClaims()
        self._has_begun = False
        self.servers = [ExpertServer(plan, logs=self.logs, life=self._life) for plan in self.plans]
        self._gateway: GatewayProcess | None = None
        if self._config is not None:
            url = f"http://{reachable(file.serve.host)}:{file.serve.port}"
            self._gateway = GatewayProcess(self._gateway_command(), url=url, logs=self.logs, life=self._life)
        self.url = self.servers[0].url if self._gateway is None else self._gateway.url
        on_cpu = any(runs_on_cpu(expert) for expert in spec.experts.values())
        self.supervisor = Supervisor(
            self.servers,
            self._gateway,
            tell=tell,
            changed=self._write_state,
            starts_at_a_time=max(1, len(usable_cores())) if on_cpu else len(self.servers),
            drain_s=file.serve.drain_s,
        )

    @property
    def replicas(self) -> list[ReplicaAddress]:
        """Where each replica listens."""
        return [plan.address for plan in self.plans]

    @property
    def replica_urls(self) -> dict[str, list[str]]:
        """The same by expert."""
        urls: dict[str, list[str]] = {}
        for address in self.replicas:
            urls.setdefault(address.expert, []).append(address.url)
        return urls

    def start(self, limit_s: float = START_LIMIT_S) -> None:
        """Start everything, wait until it serves, and keep it so.

        Raises:
            EngineFailedError: something could not be started; nothing is left running then.
        """
        self.start_engines(limit_s)
        self.start_gateway(limit_s)

    def start_engines(self, limit_s: float = START_LIMIT_S) -> None:
        """Start the engines, wait until they serve, and keep them so.

        Raises:
            EngineFailedError: something could not be started, or the gateway could not be later; nothing is left
                running then.
        """
        for port, place in self._ports.items():
            if not port_is_free(port):
                raise EngineFailedError(f"port {port} is in use; set {place} to another, or end what uses it")
            if not self._claims.claim(port):
                raise EngineFailedError(f"port {port} is another fleet's; set {place} to another, or end that fleet")
        other = read_state(self.logs)
        if other is not None and other["supervisor_pid"] != os.getpid():
            raise EngineFailedError(
                f"a fleet that runs (process {other['supervisor_pid']}) has its logs in {self.logs}; give another "
                f"folder, or remove {STATE_FILE} there if that process is something else"
            )
        if self._gateway is not None:
            self._check_gateway()
        self._has_begun = True
        if self._config is not None:
            (self.logs / GATEWAY_FILE).write_text(self._config.model_dump_json(indent=2))
        for expert, checkpoint in self.checkpoints.items():
            self._tell(f"{expert}: {checkpoint.told}")
        for line in self.warnings:
            self._tell(f"{WARNING}{line}")
        self._tell(f"starting {len(self.servers)} engine(s), logs in {self.logs}")
        self.supervisor.start_experts(limit_s)
        for server in self.servers:
            for line in server.differences():
                self._tell(line)

    def start_gateway(self, limit_s: float = START_LIMIT_S) -> None:
        """Start the gateway in front of the engines, where the fleet has one, and keep it so.

        Raises:
            EngineFailedError: it could not be started; nothing is left running then.
        """
        self.supervisor.start_gateway(limit_s)

    def stop(self, *, drain_s: float | None = None) -> None:
        """Stop everything: the gateway drains first. May be called again."""
        if self._has_begun:  # or else what is in the folder may be another fleet's
            self.supervisor.stop(drain_s=drain_s)
            (self.logs / STATE_FILE).unlink(missing_ok=True)
        self._life.close()
        self._claims.release()

    def kill(self) -> None:
        """End everything at once."""
        self._life.close()

    def kill_replica(self, expert: str, replica: int) -> None:
        """Let one replica die, as in an outage; the supervisor starts it again."""
        next(each for each in self.servers if (each.plan.expert, each.plan.replica) == (expert, replica)).kill()

    def _check_gateway(self) -> None:
        """Find now what the gateway would find wrong when the engines have been started for it."""
        try:
            from real.gateway.bind import check_bind

            check_bind(gateway_config(self.file, self.name, self.replica_urls))
        except ModuleNotFoundError as error:
            raise EngineFailedError(f"the gateway needs {error.name}: pip install 'expert-router[serve]'") from None
        except (ValueError, OSError) as error:
            raise EngineFailedError(f"gateway: {error}") from None

    def _gateway_command(self) -> list[str]:
        return [sys.executable, "-m", "real.gateway", str(self.logs / GATEWAY_FILE)]

    def _write_state(self) -> None:
        serve = self.file.serve
        state: dict[str, Any] = {
            "format": 1,
            "file": self.file.name,
            "fleet": self.name,
            "url": self.url,
            "metrics_url": None if self._gateway is None else f"http://{LOOPBACK}:{serve.metrics_port}/metrics",
            "supervisor_pid": os.getpid(),
            "gateway": None,
            "replicas": [],
            "written_unix_s": round(time.time(), 3),
        }
        for each in self.supervisor.watched:
            service = each.service
            entry = {
                "state": each.state,
                "pid": service.pid,
                "restarts": each.restarts,
                "reason": each.reason,
                "log": str(service.log),
            }
            if isinstance(service, ExpertServer):
                plan = service.plan
                entry = {"expert": plan.expert, "replica": plan.replica, "url": service.url, **entry}
                state["replicas"].append(entry)
            else:
                state["gateway"] = {"url": self.url, **entry}
        try:
            _write_atomically(self.logs / STATE_FILE, json.dumps(state, indent=2) + "\n")
        except OSError as error:  # what it tells of goes on without it
            self._tell(f"{self.logs / STATE_FILE} cannot be written: {error.strerror}")


@contextmanager
def serving(
    file: FleetFile,
    fleet_name: str | None = None,
    *,
    logs: str | Path = DEFAULT_LOGS,
    tell: Tell | None = None,
    log_iterations: bool = True,
    gateway: bool = True,
    limit_s: float = START_LIMIT_S,
) -> Iterator[RunningFleet]:
    """Serve a fleet while the block runs; whatever ends the block, or this process, ends the fleet.

    Args:
        file: from ``load_fleet``.
        fleet_name: None: the file's only one.
        logs: folder for the log of each process and the state file.
        tell: told in one line what happens.
        log_iterations: engines log every iteration, as calibration needs it.
        gateway: False leaves it out.
        limit_s: how long an engine may take to start.

    Raises:
        FleetFileError: the file cannot work.
        EngineFailedError: something could not be started.
    """
    name = only_fleet(file) if fleet_name is None else fleet_name
    fleet = RunningFleet(file, name, logs=Path(logs), tell=tell, log_iterations=log_iterations, gateway=gateway)
    with engines_of(fleet, limit_s):
        fleet.start_gateway(limit_s)
        yield fleet


@contextmanager
def engines_of(fleet: RunningFleet, limit_s: float = START_LIMIT_S) -> Iterator[None]:
    """Run a fleet's engines while the block runs; its gateway waits until the block calls ``start_gateway``.

    Raises:
        EngineFailedError: something could not be started.
    """
    try:
        fleet.start_engines(limit_s)
        yield
    finally:
        fleet.stop()


def reachable(host: str) -> str:
    """Return how a URL of this machine names what listens on a host."""
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def only_fleet(file: FleetFile) -> str:
    """Return the name of a file's only fleet.

    Raises:
        FleetFileError: it has several.
    """
    if len(file.fleets) > 1:
        raise FleetFileError([f"the file has several fleets, name one with --fleet: {', '.join(file.fleets)}"])
    return next(iter(file.fleets))


def read_state(logs: str | Path) -> dict[str, Any] | None:
    """Return the state of the fleet that writes its logs there; None when none is running."""
    try:
        state = json.loads((Path(logs) / STATE_FILE).read_text(encoding="utf-8"))
        os.kill(state["supervisor_pid"], 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if isinstance(state, dict) else None


def _plan(
    file: FleetFile, name: str, log_iterations: bool
) -> tuple[list[ReplicaPlan], dict[str, Checkpoint], list[str]]:
    experts = file.fleets[name].experts
    placements, warnings = place_replicas(experts)
    short = memory_warning(experts)
    if short is not None:
        warnings.append(short)
    checkpoints: dict[str, Checkpoint] = {}
    plans: list[ReplicaPlan] = []
    for expert_name, expert in experts.items():
        if not runs_on_cpu(expert) and only_cpu_build():
            raise ValueError(
                f"expert {expert_name!r}: gpu is {expert.gpu}, and the vLLM that is installed is the one for CPUs; "
                "install expert-router[gpu] in an environment of its own, or write gpu: CPU"
            )
        checkpoint = find_checkpoint(expert_name, expert)
        checkpoints[expert_name] = checkpoint
        warnings += checkpoint.warnings
        for replica, placement in enumerate(placements[expert_name]):
            plans.append(
                plan_replica(
                    expert_name,
                    replica,
                    expert,
                    checkpoint=checkpoint,
                    placement=placement,
                    port=file.serve.expert_port + len(plans),
                    log_iterations=log_iterations,
                )
            )
    return plans, checkpoints, warnings


def _ports(file: FleetFile, plans: Sequence[ReplicaPlan], *, has_gateway: bool) -> dict[int, str]:
    """Return each port that a fleet needs and the field that it comes from."""
    serve = file.serve
    wanted = [(plan.port, "serve.expert_port") for plan in plans]
    if has_gateway:
        wanted += [(serve.port, "serve.port"), (serve.metrics_port, "serve.metrics_port")]
    ports: dict[int, str] = {}
    for port, field in wanted:
        if port in ports:
            counts_up = f", {len(plans)} replicas counting up from {serve.expert_port}" if len(plans) > 1 else ""
            raise FleetFileError([f"{field} and {ports[port]} both come to {port}{counts_up}; set one to another"])
        if port > LAST_PORT:
            raise FleetFileError([f"serve.expert_port {serve.expert_port} leaves no ports for {len(plans)} replicas"])
        ports[port] = field
    return ports


def _write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as fresh:
        fresh.write(text)
    Path(fresh.name).replace(path)
