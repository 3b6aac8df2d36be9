"""A guard around one command: nothing that the command started outlives it, or outlives whoever started the guard.

    python -m real.processes.guard --life FD --temporary FOLDER [--cores 0,1] -- COMMAND...

vLLM's API server starts its engine core, which starts workers, and when the API server or whoever started it is killed
with -9 those two live on, holding memory and cores. The guard adopts orphans (a sub-reaper) and kills what is left of
its process group when the command ends, when the guard is told to stop twice, or when the pipe FD closes: its other
end is held by the supervisor alone, so it closes however the supervisor ends. A pipe rather than the parent-death
signal for that, because the signal also comes when the thread that started the guard ends. If the guard itself is
killed, the command gets the parent-death signal and the supervisor, who sees the guard end, kills the group.

Nor do its files: the command's temporary folder is removed, with the sockets that a killed vLLM leaves there, and
Python's resource trackers are let live until they have removed the shared memory of those that were killed.

SIGTERM and SIGINT go to the command as SIGTERM. The exit status is the command's, 128 + N after signal N. Only the
standard library is used: a guard takes some 10 MB and 30 ms.
"""

import argparse
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from real.processes.parent_death import die_with_parent, prctl

_PR_SET_CHILD_SUBREAPER = 36

_SWEEP_S = 10.0  # for killed processes to be gone
_TRACKERS_S = 3.0  # for resource trackers to end of themselves, once all they track for are gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command under guard and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m real.processes.guard")
    parser.add_argument("--life", type=int, required=True)
    parser.add_argument("--temporary", type=Path, required=True)
    parser.add_argument("--cores", default="")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    if os.getpgrp() != os.getpid():
        os.setsid()
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    try:
        return _watch(options.command, options.life)
    finally:
        shutil.rmtree(options.temporary, ignore_errors=True)


def _watch(command: Sequence[str], life: int) -> int:
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(tell)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=partial(die_with_parent, os.getpid()))
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    stops = 0
    with selectors.DefaultSelector() as selector:
        selector.register(life, selectors.EVENT_READ)
        selector.register(told, selectors.EVENT_READ)
        while child.poll() is None and stops < 2:
            for key, _ in selector.select():
                got = os.read(key.fd, 4096)
                if key.fd == life:
                    stops = 2  # nobody is left to serve
                    break
                told_now = sum(number in (signal.SIGTERM, signal.SIGINT) for number in got)
                stops += told_now
                if told_now and stops == 1:
                    child.send_signal(signal.SIGTERM)
            _reap(but=child.pid)
    if child.poll() is None:
        child.kill()
        child.wait()
    _sweep()
    status = child.returncode
    return status if status >= 0 else 128 - status


def _sweep() -> None:
    """Kill whatever of the group, or adopted by the guard, is left; return when it is gone."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < _SWEEP_S:
        _reap()
        left = _left()
        if not left:
            return
        for pid in left:
            if passed < _TRACKERS_S and _is_resource_tracker(pid):
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _is_resource_tracker(pid: int) -> bool:
    """Whether this is the process by which Python's ``multiprocessing`` removes what others leave in shared memory."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _left() -> list[int]:
    """Processes of the guard's group, and the guard's children in whatever group; all but the guard and zombies."""
    own = os.getpid()
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        state, parent, group = fields[0], int(fields[1]), int(fields[2])
        pid = int(path.parent.name)
        if pid != own and state not in "ZX" and own in (parent, group):
            found.append(pid)
    return found


def _reap(but: int | None = None) -> None:
    """Take the exit status of adopted orphans, leaving the command's own to ``subprocess``."""
    for path in Path(f"/proc/{os.getpid()}/task/{os.getpid()}").glob("children"):
        for pid in map(int, path.read_text().split()):
            if pid != but:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue


if __name__ == "__main__":
    sys.exit(main())
