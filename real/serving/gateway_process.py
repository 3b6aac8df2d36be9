"""The gateway as a child process: ``python -m real.gateway CONFIG.json``, ready when its log says so."""

import time
from collections.abc import Sequence
from pathlib import Path

from real.experts.expert_server import EngineFailedError
from real.processes.guarded_process import GuardedProcess, LifeLine, child_environment

_READY = "gateway: ready at "
"""How the line of its log begins that says so (``real.gateway.__main__``)."""


class GatewayProcess:
    """The gateway, started and watched like an expert.

    Attributes:
        name: as messages call it.
        url: where users send to.
        started_s: monotonic time of the latest start; None before.
    """

    name = "gateway"

    def __init__(
        self, command: Sequence[str], *, url: str, logs: Path, life: LifeLine, cores: Sequence[int] = ()
    ) -> None:
        """Nothing is started yet; the log is ``gateway.log`` in ``logs``. Empty ``cores`` confine it to none."""
        self.url = url
        self.started_s: float | None = None
        self._is_ready = False
        self._process = GuardedProcess(
            command,
            log=logs / "gateway.log",
            life=life,
            environment=child_environment({"PYTHONUNBUFFERED": "1"}),
            cores=cores,
        )

    @property
    def log(self) -> Path:
        """Its log file."""
        return self._process.log

    @property
    def pid(self) -> int | None:
        """Its process group."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._process.is_running

    def start(self) -> None:
        """Start it without waiting."""
        self.started_s = time.monotonic()
        self._is_ready = False
        self._process.start()

    def is_ready(self) -> bool:
        """Whether it has said that it listens.

        Raises:
            EngineFailedError: it has ended.
        """
        status = self._process.exit_status
        if status is not None:
            lines = [line for line in self._process.log_text().splitlines() if line.strip()]
            last = lines[-1] if lines else "nothing"
            raise EngineFailedError(f"gateway: it ended with status {status}: {last}; log: {self.log}")
        if not self._is_ready:
            self._is_ready = any(line.startswith(_READY) for line in self._process.log_text().splitlines())
        return self._is_ready

    def stage(self) -> str:
        """How far the start is."""
        return "starting"

    def terminate(self) -> None:
        """Ask it to drain and end, without waiting."""
        self._process.terminate()

    def stop(self, grace_s: float) -> None:
        """End it: it may drain for ``grace_s``."""
        self._process.stop(grace_s)
