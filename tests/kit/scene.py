"""A gateway in front of mock experts, and the ledger: each request has one outcome, the same on all three sides."""

import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.kit.client import Client, Reply, Settled, play
from tests.kit.ledger import check_ledger
from tests.kit.processes import Expert, GatewayProcess, config_for, running


class Scene:
    """The processes of one test."""

    def __init__(self, folder: Path, experts: Mapping[str, int], behaviour: Mapping[str, Any], **config: Any) -> None:
        self.folder = folder
        self.behaviour = dict(behaviour)
        self.experts = {
            name: [self._expert(name, index, wait=False) for index in range(count)] for name, count in experts.items()
        }
        for expert in self.all:
            expert.wait_until_ready()
        urls = {name: [expert.url for expert in replicas] for name, replicas in self.experts.items()}
        self.environment = config.pop("environment", None)
        self.config = config_for(urls, request_log=folder / "gateway.log", **config)
        self.gateway = GatewayProcess(self.config, folder, self.environment)
        self.replies: list[Reply] = []
        self.settled: list[Settled] = []

    def _expert(self, name: str, index: int, port: int | None = None, *, wait: bool = True) -> Expert:
        log = self.folder / f"{name}-{index}.log"
        return Expert(name, port=port, log=log, wait=wait, **self.behaviour)

    @property
    def all(self) -> list[Expert]:
        return [expert for replicas in self.experts.values() for expert in replicas]

    def play(self, story: Callable[[Client], Awaitable[None]]) -> None:
        """Run a story with a client of the gateway."""
        play(self.gateway.port, story, self.replies)

    def restart(self, name: str, index: int = 0) -> Expert:
        """Start a killed expert again, at its old port."""
        old = self.experts[name][index]
        old.close()
        self.experts[name][index] = self._expert(name, index, old.port)
        return self.experts[name][index]

    def restart_gateway(self) -> None:
        """Start another in the place of one that has ended."""
        assert "Traceback" not in self.gateway.error_text(), self.gateway.error_text()
        self.gateway.close()
        self.gateway = GatewayProcess(self.config, self.folder, self.environment)

    # ------------------------------------------------------------------------------------------------- the ledger

    def gateway_log(self) -> list[dict[str, Any]]:
        path = self.folder / "gateway.log"
        return _lines(path) if path.exists() else []

    def expert_logs(self) -> dict[str, list[dict[str, Any]]]:
        return {path.stem: _lines(path) for path in sorted(self.folder.glob("*-*.log"))}

    def check_ledger(self) -> Counter[str]:
        """Hold the three sides together; return how many requests had which outcome by the client's account."""
        everyone = (*self.settled, *(reply.settled for reply in self.replies))
        replies = [reply for reply in everyone if reply.path.endswith("completions")]
        outcomes = check_ledger(replies, self.gateway_log())
        starts: Counter[str] = Counter()
        finished: Counter[str] = Counter()
        for log in self.expert_logs().values():
            starts.update(line["id"] for line in log if line["what"] == "start")
            finished.update(line["id"] for line in log if line["what"] == "completed")
        for reply in replies:
            assert starts[reply.request_id] <= 2
            assert reply.outcome != "completed" or finished[reply.request_id] == 1
        sent = {reply.request_id for reply in replies}
        assert set(starts) <= sent, f"an expert got what nobody sent: {set(starts) - sent}"
        return outcomes


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log whose process may just be writing one more."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@contextlib.contextmanager
def scene(
    folder: Path, experts: Mapping[str, int] | None = None, behaviour: Mapping[str, Any] | None = None, **config: Any
) -> Iterator[Scene]:
    """Start experts (name -> replicas) and a gateway, and end them whatever happens."""
    built = Scene(folder, experts or {"code": 1}, behaviour or {}, **config)
    try:
        yield built
        assert "Traceback" not in built.gateway.error_text(), built.gateway.error_text()
    finally:
        with running(built.gateway, *built.all):
            pass
