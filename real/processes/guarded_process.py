"""A long-running child process with its own group, log file, temporary folder and guard.

Nothing of it is ever left behind.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_LOG_TAIL_BYTES = 2**21

_LONGEST_PLACE_BYTES = 50
"""vLLM makes unix sockets in its temporary folder, and the path of one may have 107 bytes (103 on a Mac)."""


class LifeLine:
    """A pipe whose one end this process alone holds: when it ends, however it ends, the guards at the other end see it.

    Closing it kills every process guarded by it at once.
    """

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()  # neither is inherited unless passed on by name
        self._open = True

    def close(self) -> None:
        """Let go; may be called again."""
        if self._open:
            self._open = False
            os.close(self._write_fd)
            os.close(self.read_fd)


class GuardedProcess:
    """One command under guard, with its output in a log file.

    Attributes:
        command: as started.
        log: the file that output is appended to.
        log_start: bytes in the log before the latest start.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        life: LifeLine,
        environment: Mapping[str, str] | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        """Nothing is started yet.

        Args:
            command: the program and its arguments.
            log: appended to; its folder is made.
            life: the command ends with it.
            environment: None: this process's.
            cores: the command is confined to these; empty: to none.
        """
        self.command = list(command)
        self.log = log
        self.log_start = 0
        self._life = life
        self._environment = None if environment is None else dict(environment)
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary: Path | None = None
        self._swept = True

    def start(self) -> None:
        """Start the command; it must not be running."""
        assert not self.is_running
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = _temporary_folder()
        guard = [sys.executable, "-m", "real.processes.guard", "--life", str(self._life.read_fd)]
        guard += ["--temporary", str(self._temporary)]
        environment = os.environ if self._environment is None else self._environment
        if self._cores:
            guard += ["--cores", ",".join(map(str, self._cores))]
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self._swept = False
            self._process = subprocess.Popen(
                [*guard, "--", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "TMPDIR": str(self._temporary)},
                pass_fds=[self._life.read_fd],
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The command's, 128 + N after signal N; None while it runs."""
        if self._process is None:
            return None
        status = self._process.poll()
        if status is not None:
            self._sweep()
        return 128 - status if status is not None and status < 0 else status

    @property
    def pid(self) -> int | None:
        """The guard's process and group id; None before the first start."""
        return None if self._process is None else self._process.pid

    def terminate(self) -> None:
        """Ask the command to end (SIGTERM); ``stop`` waits as well."""
        if self._process is not None and self.is_running:
            self._process.terminate()

    def kill(self) -> None:
        """Let the command die (SIGKILL), without waiting; its guard then kills what it leaves. Linux only."""
        if self._process is not None and self.is_running:
            for path in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
                for child in map(int, path.read_text().split()):
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)

    def stop(self, grace_s: float) -> None:
        """End the command: asked first, killed with all it started when it takes longer than ``grace_s``."""
        if self._process is None:
            return
        self.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # told twice, the guard kills
            try:
                self._process.wait(10.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._sweep()

    def log_text(self) -> str:
        """What the command has written since its latest start; of a long log the end."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(self.log_start, self.log.stat().st_size - _LOG_TAIL_BYTES))
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _sweep(self) -> None:
        """Remove what a guard that has ended has left of its group and folder: nothing, unless it was killed itself."""
        assert self._process is not None
        assert self._temporary is not None
        if self._swept:
            return
        self._swept = True  # once: the number may by and by become somebody else's
        with suppress(ProcessLookupError, PermissionError):  # macOS refuses for zombies
            os.killpg(self._process.pid, signal.SIGKILL)
        shutil.rmtree(self._temporary, ignore_errors=True)


def _temporary_folder() -> Path:
    """Make a folder for one start's temporary files, which nobody else can read and whose path is short."""
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > _LONGEST_PLACE_BYTES:
        place = "/tmp"
    return Path(tempfile.mkdtemp(prefix="er-", dir=place))


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with changes, such that children import the same ``real`` package."""
    root = str(Path(__file__).parents[2])
    search = [root, *(part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != root)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search), **changes}
