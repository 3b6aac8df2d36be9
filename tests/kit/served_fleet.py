"""A fleet as a user serves it: ``expert-router serve`` as a process, and what anybody can see of it from outside."""

import json
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from real.processes.guarded_process import child_environment
from real.processes.ports import port_is_free
from real.serving.fleet import REQUEST_LOG, STATE_FILE
from tests.kit.process_tree import becomes_true, children_of, is_alive
from tests.real_fleet import ROOT, cli

START_S = 420  # two engines, on a machine that is busy with other things


class ServedFleet:
    """The process and its files.

    Attributes:
        logs: its folder of logs, whose ends are shown when a test fails.
        temporary: what it takes for the system's temporary folder.
        port: of the gateway; the metrics' and the experts' follow.
    """

    def __init__(self, file: str, *arguments: str, folder: Path) -> None:
        self.logs = folder / "logs"
        self.temporary = Path(tempfile.mkdtemp(prefix="served-"))
        settings = free_ports(26100)
        self.port = int(settings[0].partition("=")[2])
        arguments = (*arguments, *(word for setting in settings for word in ("--set", setting)))
        command = cli(["serve", file, "--logs", str(self.logs), "--log-requests", *arguments])
        self.logs.mkdir()
        with (self.logs / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=child_environment({"TMPDIR": str(self.temporary)}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        self.wait(lambda: self.says("Ctrl-C drains and stops"), START_S, "serve to say that the fleet is up")

    def says(self, words: str) -> bool:
        return words in (self.logs / "serve.log").read_text()

    def wait(self, condition: Callable[[], bool], within_s: float, what: str) -> float:
        """Wait for something, and return how long that took."""
        began_s = time.monotonic()

        def over() -> bool:
            ended = self.process.poll()
            assert ended is None, f"serve ended with {ended} while waiting for {what}:\n{log_ends(self.logs)}"
            return condition()

        assert becomes_true(over, within_s), f"waited {within_s:g} s in vain for {what}:\n{log_ends(self.logs)}"
        return time.monotonic() - began_s

    # ------------------------------------------------------------------------------------------------ its processes

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.logs / STATE_FILE).read_text())
        return found

    def replica(self, expert: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each for each in self.state()["replicas"] if each["expert"] == expert)
        return found

    def workers(self) -> list[int]:
        """The gateway's worker processes."""
        guard = self.state()["gateway"]["pid"]
        return [pid for parent in children_of(guard) for pid in children_of(parent)]

    def processes(self) -> list[int]:
        """All of them, serve itself first."""
        found = [self.process.pid]
        for pid in found:  # which grows meanwhile
            found += children_of(pid)
        return found

    def stop(self) -> int:
        """Ask it to end, as a service manager would; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def close(self) -> None:
        """End it if it still runs, whatever it takes."""
        if self.process.poll() is None:
            left = self.processes()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()  # the guards end the rest
                self.process.wait()
            becomes_true(lambda: not any(map(is_alive, left)), 20)
        shutil.rmtree(self.temporary, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------- its accounts

    def of_gateway(self, name: str, **labels: str) -> float:
        """Sum of a metric of the gateway over the labels not given."""
        return _total(f"http://127.0.0.1:{self.port + 1}/metrics", f"expert_router_{name}", labels)

    def of_engine(self, expert: str, name: str, **labels: str) -> float:
        """The same of an engine."""
        return _total(f"{self.replica(expert)['url']}/metrics", f"vllm:{name}", labels)

    def is_quiet(self) -> bool:
        """Whether nothing is under way, by the account of the gateway and of every engine that answers."""
        experts = [each["expert"] for each in self.state()["replicas"] if each["state"] == "ready"]
        return (
            self.of_gateway("open_requests") == self.of_gateway("inflight") == self.of_gateway("queue_depth") == 0
            and sum(self.of_engine(name, "num_requests_running") for name in experts) == 0
        )

    def request_log(self) -> list[dict[str, Any]]:
        """The gateway's own account of each request that has ended."""
        path = self.logs / REQUEST_LOG
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def free_ports(first: int) -> tuple[str, str, str]:
    """Settings of a fleet file of up to 8 replicas for ports that are free, looked for from the first on."""
    port = next(port for port in range(first, 60000, 10) if all(map(port_is_free, range(port, port + 10))))
    return f"serve.port={port}", f"serve.metrics_port={port + 1}", f"serve.expert_port={port + 2}"


def _total(url: str, name: str, labels: dict[str, str]) -> float:
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def log_ends(folder: Path, lines: int = 25) -> str:
    """The ends of all logs in a folder."""
    texts = []
    for path in sorted(folder.rglob("*.log")):
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 20_000))
            text = stream.read().decode(errors="replace")
        texts.append(f"---- end of {path}\n" + "\n".join(text.splitlines()[-lines:]))
    return "\n".join(texts)
