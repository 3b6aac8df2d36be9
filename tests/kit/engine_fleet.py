"""The processes of a fleet whose engines are the simulator's own: a server a replica, and the real gateway before."""

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from time import monotonic

from real.gateway.config import gateway_config
from sim.fleet_file import LoadedFleetFile
from tests.kit.engine_expert import EngineTimes, read_log
from tests.kit.processes import GatewayProcess, Process, free_port, running


class EngineExpert(Process):
    """One replica: ``tests.kit.engine_expert``."""

    def __init__(
        self,
        file: Path,
        name: str,
        *,
        port: int | None = None,
        time_factor: float = 1.0,
        log: Path | None = None,
        order: Path | None = None,
    ) -> None:
        """Start it; ``wait_until_ready`` waits. With ``order`` it listens when it is told to."""
        self.port = port or free_port()
        self.log = log
        self.order = order
        arguments = [str(file), name, "--port", str(self.port), "--time-factor", str(time_factor)]
        for option, path in (("--log", log), ("--order", order)):
            arguments += [option, str(path)] if path is not None else []
        super().__init__("tests.kit.engine_expert", *arguments)

    def listen_at(self, time_s: float) -> None:
        """Let one that waits for it listen at this ``time.monotonic()``."""
        assert self.order is not None
        fresh = self.order.with_suffix(".new")
        fresh.write_text(str(time_s))
        fresh.rename(self.order)

    def wait_until_ready(self) -> None:
        """Wait until it listens, or until it could if it were told to."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said == (b"ready\n" if self.order is None else b"loaded\n"), self.error_text()

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
        # Those that will take the places of dead ones, so that they come back when they are to.
        self._dead: list[EngineExpert] = []
        self._spares: dict[tuple[str, int], list[EngineExpert]] = {}
        for number, outage in enumerate(sorted(file.fleets[fleet].outages, key=lambda outage: outage.at_s)):
            if outage.for_s is not None:
                old = self.experts[outage.expert][outage.replica]
                spare = EngineExpert(path, outage.expert, port=old.port, log=old.log, order=folder / f"order-{number}")
                self._spares.setdefault((outage.expert, outage.replica), []).append(spare)
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
    def experts_up(self) -> list[EngineExpert]:
        """The replicas, those included that are to come back."""
        return [replica for replicas in self.experts.values() for replica in replicas]

    @property
    def all(self) -> list[EngineExpert]:
        """Every process of an expert."""
        return [*self.experts_up, *self._dead, *(each for spares in self._spares.values() for each in spares)]

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
        return {
            key: times for each in self.experts_up if each.log is not None for key, times in read_log(each.log).items()
        }

    def kill(self, name: str, replica: int, for_s: float) -> None:
        """``kill -9``, and listen again so many seconds later; returns at once, as ``real.users.run`` wants it."""
        self.experts[name][replica].signal(signal.SIGKILL)
        if isfinite(for_s):
            self._dead.append(self.experts[name][replica])
            spare = self.experts[name][replica] = self._spares[name, replica].pop(0)
            spare.listen_at(monotonic() + for_s)


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
