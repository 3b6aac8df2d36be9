"""Mock experts and gateways as processes that can really die."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real.gateway.config import GatewayConfig, GatewayExpert
from sim.serve_spec import ServeSpec
from sim.spec import RouterSpec

ROOT = Path(__file__).parent.parent.parent
CLASSES = ("code", "maths", "talk", "rest")
RULES = {"kind": "rules", "rules": {name: [rf"\b{name}\b"] for name in CLASSES[:-1]}, "otherwise": "rest"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A child process in the worktree, its pipes read by us."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe nobody reads would hold the process up
        self.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # nothing stays when it is killed
        own = {"PYTHONPATH": str(ROOT), "TMPDIR": self.temporary.name}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **own, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()
        self.temporary.cleanup()

    def error_text(self) -> str:
        """What it has said on stderr so far."""
        return os.pread(self.errors.fileno(), 2**20, 0).decode()


class Expert(Process):
    """A mock expert."""

    def __init__(
        self,
        model: str = "code",
        *,
        port: int | None = None,
        log: Path | None = None,
        curve: Mapping[str, float] | None = None,
        wait: bool = True,
        **behaviour: Any,
    ) -> None:
        self.port = port or free_port()
        self.model = model
        self.log = log
        arguments = ["--port", str(self.port), "--model", model, "--behaviour", json.dumps(behaviour)]
        arguments += ["--log", str(log)] if log is not None else []
        arguments += ["--curve", json.dumps(curve)] if curve is not None else []
        super().__init__("tests.kit.mock_expert", *arguments)
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def state(self) -> dict[str, Any]:
        return dict(fetch_json(f"{self.url}/mock/state"))

    def behave(self, **behaviour: Any) -> None:
        fetch_json(f"{self.url}/mock/behave", json.dumps(behaviour).encode())


class Splice(Process):
    """The least that a proxy can do, in front of one expert."""

    def __init__(self, expert: Expert) -> None:
        self.port = free_port()
        super().__init__("tests.kit.splice", "--port", str(self.port), "--to", str(expert.port))
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def resident_mb(self) -> float:
        return resident_mb(self.pid)

    def cpu_s(self) -> float:
        return cpu_s(self.pid)


def fetch_json(url: str, data: bytes | None = None) -> Any:
    with urllib.request.urlopen(url, data, timeout=10) as reply:
        return json.loads(reply.read())


class GatewayProcess(Process):
    """A gateway: parent, workers and all."""

    def __init__(self, config: GatewayConfig, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.config = config
        self.port = config.serve.port
        path = folder / f"gateway-{self.port}.json"
        path.write_text(config.model_dump_json())
        super().__init__("real.gateway", str(path), environment=environment)
        while "ready" not in self.error_text():
            assert self.process.poll() is None, self.error_text()
            time.sleep(0.01)

    def metrics(self) -> dict[str, float]:
        """Every sample, by name and labels as exposed."""
        url = f"http://127.0.0.1:{self.config.serve.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric over what is not given."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for key, value in self.metrics().items()
            if re.split(r"[{]", key)[0] == f"expert_router_{name}" and all(want in key for want in wanted)
        )

    def workers(self) -> list[int]:
        """Process ids of the workers, oldest first."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return sorted(int(child) for child in children)

    def resident_mb(self) -> float:
        """Of the workers together."""
        return sum(resident_mb(pid) for pid in self.workers())

    def cpu_s(self) -> float:
        """User and system seconds of the workers."""
        return sum(cpu_s(pid) for pid in self.workers())


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_s(pid: int) -> float:
    """User and system seconds of a process of one thread, to the nanosecond where the kernel tells."""
    schedstat = Path(f"/proc/{pid}/schedstat")
    if schedstat.exists() and (on_cpu_ns := int(schedstat.read_text().split()[0])):
        return on_cpu_ns / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Footprint:
    """What the workers of a gateway hold."""

    files: int
    resident_mb: float


def footprint(gateway: "GatewayProcess") -> Footprint:
    return Footprint(sum(open_files(pid) for pid in gateway.workers()), gateway.resident_mb())


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def config_for(
    experts: Mapping[str, Sequence[str]],
    *,
    router: Mapping[str, Any] | None = None,
    request_log: Path | None = None,
    classifier: Mapping[str, Any] | None = None,
    class_map: Mapping[str, list[str]] | None = None,
    saturated_at: Mapping[str, float] | None = None,
    **serve: Any,
) -> GatewayConfig:
    """A gateway in front of experts (name -> URLs of replicas) that each serve the class of their name, or all."""
    names = list(experts)
    return GatewayConfig(
        fleet="tested",
        classes=list(CLASSES),
        class_map={name: [name] if name in names else [names[0]] for name in CLASSES} | dict(class_map or {}),
        experts=[
            GatewayExpert(
                name=name,
                served_model=name,
                replica_urls=list(urls),
                saturated_at=(saturated_at or {}).get(name, 256),
            )
            for name, urls in experts.items()
        ],
        router=RouterSpec(**(router or {})),
        serve=ServeSpec(
            **{"port": free_port(), "metrics_port": free_port(), "classifier": classifier or RULES, **serve}
        ),
        request_log=None if request_log is None else str(request_log),
    )


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    """End them all, whatever happens."""
    try:
        yield
    finally:
        for process in processes:
            process.close()


async def until(condition: Any, timeout_s: float = 10.0, every_s: float = 0.02, what: str = "something") -> float:
    """Wait until a condition holds; return how long that took."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not await asyncio.to_thread(condition):
        assert loop.time() - began_s < timeout_s, f"waited {timeout_s:g} s in vain for {what}"
        await asyncio.sleep(every_s)
    return loop.time() - began_s
