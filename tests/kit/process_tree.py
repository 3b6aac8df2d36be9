"""What processes are there, by what they were started for."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def processes_of_group(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX" and int(fields[2]) == group:
            found.append(int(path.parent.name))
    return found


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and not yet seen end; none when it is gone itself."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):  # a thread's own are with the thread
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def child_named(group: int, words: str) -> int:
    """The process of a group whose command line contains these words, the guard aside."""
    for pid in processes_of_group(group):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        if words in line and "real.processes.guard" not in line:
            return pid
    raise AssertionError(f"no {words!r} in group {group}")


def becomes_true(what: Callable[[], bool], within_s: float) -> bool:
    """Wait for something; whether it came about."""
    end = time.monotonic() + within_s
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
