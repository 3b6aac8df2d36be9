"""The processes of a fleet whose engines are the simulator's own: a server a replica, and the real gateway before."""

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from real.gateway.config import gateway_config
from sim.fleet_file import LoadedFleetFile
from tests.kit.engine_expert import EngineTimes, read_log
from tests.kit.processes import GatewayProcess, Process, free_port, running


class EngineExpert(Process):
    """One replica: ``tests.kit.engine_expert``."""

    def __init__(
        self, file: Path, name: str, *, port: int | None = None, time_factor: float = 1.0, log: Path | None = None
    ) -> None:
        """Start it; ``wait_until_ready`` waits."""
        self.port = port or free_port()
        self.log = log
        arguments = [str(file), name, "--port", str(self.port), "--time-factor", str(time_factor)]
        arguments += ["--log", str(log)] if log is not None else []
        super().__init__("tests.kit.engine_expert", *arguments)

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n", self.error_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class EngineFleet:
    """What runs.

    Attributes:
        experts: name -> its replicas.
        request_log: the gateway's own account, a JSON line a request.
    """

    def __init__(self, path: Path, file: LoadedFleetFile, fleet: str, folder: Path) -> None:
        """Start everything; ``file`` is ``path`` as loaded, perhaps with changes to its router."""
        self._path = path
        self.experts = {
            name: [EngineExpert(path, name, log=folder / f"{name}-{each}.jsonl") for each in range(spec.replicas)]
            for name, spec in file.fleets[fleet].experts.items()
        }
        try:
            for replica in self.all:
                replica.wait_until_ready()
            self.request_log = folder / "requests.jsonl"
            serve = file.serve.model_copy(update={"port": free_port(), "metrics_port": free_port()})
            config = gateway_config(
                file.model_copy(update={"serve": serve}), fleet, self.replica_urls, request_log=str(self.request_log)
            )
            self.gateway = GatewayProcess(config, folder)
        except BaseException:
            with running(*self.all):
                raise

    @property
    def all(self) -> list[EngineExpert]:
        return [replica for replicas in self.experts.values() for replica in replicas]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    @property
    def replica_urls(self) -> dict[str, list[str]]:
        return {name: [replica.url for replica in replicas] for name, replicas in self.experts.items()}

    def pin_gateway(self, cores: Collection[int]) -> None:
        """Keep the gateway's processes to some cores."""
        for pid in (self.gateway.pid, *self.gateway.workers()):
            os.sched_setaffinity(pid, cores)

    def engine_times(self) -> dict[str, EngineTimes]:
        """What the engines noted of each request, by its id."""
        return {key: times for each in self.all if each.log is not None for key, times in read_log(each.log).items()}

    def kill(self, name: str, replica: int) -> None:
        """``kill -9``, without waiting for the end of it."""
        self.experts[name][replica].signal(signal.SIGKILL)

    def restart(self, name: str, replica: int) -> None:
        """Start a killed replica again, at its old port, without waiting until it answers."""
        old = self.experts[name][replica]
        old.close()
        self.experts[name][replica] = EngineExpert(self._path, name, port=old.port, log=old.log)


@contextmanager
def engine_fleet(path: Path, file: LoadedFleetFile, fleet: str, folder: Path) -> Iterator[EngineFleet]:
    """Start a fleet's processes and end them, whatever happens."""
    built = EngineFleet(path, file, fleet, folder)
    try:
        yield built
        assert "Traceback" not in built.gateway.error_text(), built.gateway.error_text()
    finally:
        with running(built.gateway, *built.all):
            pass
