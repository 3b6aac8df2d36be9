"""Nothing that a guarded command started outlives it, or outlives whoever started it, however they end."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from real.processes.guarded_process import GuardedProcess, LifeLine, child_environment
from tests.kit.process_tree import becomes_true, child_named, is_alive, processes_of_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guards adopt orphans on Linux only")

# A command with a child in its own group and one in a session of its own, which writes down all three.
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
near, far = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)
print(os.getpid(), near.pid, far.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def life() -> Iterator[LifeLine]:
    line = LifeLine()
    yield line
    line.close()


def started(tmp_path: Path, life: LifeLine, code: str = FAMILY, cores: tuple[int, ...] = ()) -> GuardedProcess:
    process = GuardedProcess(
        [sys.executable, "-c", code], log=tmp_path / "log", life=life, environment=child_environment({}), cores=cores
    )
    process.start()
    return process


def family_of(process: GuardedProcess) -> list[int]:
    assert becomes_true(lambda: len(process.log_text().split()) == 3, 10)
    return [int(pid) for pid in process.log_text().split()]


def all_gone(pids: list[int]) -> bool:
    return becomes_true(lambda: not any(is_alive(pid) for pid in pids), 10)


def test_stopping_ends_the_command_and_all_it_started(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life)
    family = family_of(process)
    process.stop(5)
    assert all_gone(family)
    assert process.exit_status == 128 + signal.SIGTERM


def test_a_command_killed_leaves_nothing_behind(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life)
    family = family_of(process)
    os.kill(family[0], signal.SIGKILL)
    assert all_gone(family)
    assert becomes_true(lambda: process.exit_status == 128 + signal.SIGKILL, 10)


def test_a_guard_killed_leaves_nothing_of_its_group_behind(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life)
    family = family_of(process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert becomes_true(lambda: process.exit_status == 128 + signal.SIGKILL, 10)
    assert all_gone(family[:2])
    if is_alive(family[2]):
        os.kill(family[2], signal.SIGKILL)  # in a session of its own, and the one who would have found it is gone


def test_an_outage_kills_the_command_and_its_family_and_it_can_start_again(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life)
    pids = family_of(process)
    process.kill()
    assert becomes_true(lambda: process.exit_status is not None, 10)
    assert process.exit_status == 128 + signal.SIGKILL
    assert all_gone(pids)
    process.start()
    assert family_of(process) != pids
    process.stop(0)


def test_when_the_life_line_closes_everything_ends(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life)
    family = family_of(process)
    life.close()
    assert all_gone(family)
    assert becomes_true(lambda: process.exit_status == 128 + signal.SIGKILL, 10)


def test_when_the_one_who_started_it_is_killed_everything_ends(tmp_path: Path) -> None:
    starter = (
        "import sys, time; from pathlib import Path; from real.processes.guarded_process import *;"
        f"p = GuardedProcess([sys.executable, '-c', {FAMILY!r}], log=Path({str(tmp_path / 'log')!r}), life=LifeLine());"
        "p.start(); print(p.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, env=child_environment({})
    ) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        log = tmp_path / "log"
        assert becomes_true(lambda: log.is_file() and len(log.read_text().split()) == 3, 10)
        parent.kill()
    assert all_gone([int(pid) for pid in log.read_text().split()])
    assert becomes_true(lambda: not processes_of_group(group), 10)


def test_a_command_that_will_not_end_is_killed_after_the_grace(tmp_path: Path, life: LifeLine) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('a b c', flush=True); time.sleep(600)"
    process = started(tmp_path, life, stubborn)
    assert becomes_true(lambda: "a b c" in process.log_text(), 10)
    process.stop(0.2)
    assert not process.is_running
    assert process.exit_status == 128 + signal.SIGKILL


def test_the_exit_status_is_the_commands(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life, "raise SystemExit(7)")
    assert becomes_true(lambda: process.exit_status == 7, 10)


def test_a_command_that_is_not_there_says_so(tmp_path: Path, life: LifeLine) -> None:
    process = GuardedProcess(["/no/such/program"], log=tmp_path / "log", life=life, environment=child_environment({}))
    process.start()
    assert becomes_true(lambda: process.exit_status == 127, 10)
    assert "cannot start /no/such/program: No such file or directory" in process.log_text()


def test_the_command_is_confined_to_its_cores(tmp_path: Path, life: LifeLine) -> None:
    core = min(os.sched_getaffinity(0))
    process = started(tmp_path, life, "import os; print(os.sched_getaffinity(0))", cores=(core,))
    assert becomes_true(lambda: process.exit_status == 0, 10)
    assert process.log_text().strip() == str({core})


# A command that has a temporary file and, through a child of its own, shared memory; it writes down where.
MESSY = """
import tempfile, time
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory

def child(name):
    time.sleep(600)

if __name__ == "__main__":
    shared = SharedMemory(create=True, size=100)
    get_context("spawn").Process(target=child, args=(shared.name,), daemon=True).start()
    print(tempfile.mkstemp()[1], "/dev/shm/" + shared.name, flush=True)
    time.sleep(600)
"""

# What vLLM does.
SOCKET = """
import socket, tempfile, uuid
socket.socket(socket.AF_UNIX).bind(f"{tempfile.gettempdir()}/{uuid.uuid4()}")
"""


def messy(tmp_path: Path, life: LifeLine) -> tuple[GuardedProcess, Path, Path]:
    script = tmp_path / "messy.py"
    script.write_text(MESSY)
    process = GuardedProcess(
        [sys.executable, str(script)], log=tmp_path / "log", life=life, environment=child_environment({})
    )
    process.start()
    assert becomes_true(lambda: len(process.log_text().split()) == 2, 10)
    file, shared = map(Path, process.log_text().split())
    assert file.exists()
    assert shared.exists()
    return process, file.parent, shared


def test_a_command_killed_leaves_no_files_and_no_shared_memory(tmp_path: Path, life: LifeLine) -> None:
    process, folder, shared = messy(tmp_path, life)
    assert process.pid is not None
    os.kill(child_named(process.pid, "messy.py"), signal.SIGKILL)
    assert becomes_true(lambda: process.exit_status == 128 + signal.SIGKILL, 10)
    assert not folder.exists()
    assert not shared.exists()


def test_when_the_life_line_closes_no_files_and_no_shared_memory_are_left(tmp_path: Path, life: LifeLine) -> None:
    process, folder, shared = messy(tmp_path, life)
    life.close()
    assert becomes_true(lambda: process.exit_status == 128 + signal.SIGKILL, 10)
    assert not folder.exists()
    assert not shared.exists()


def test_a_guard_killed_leaves_no_files(tmp_path: Path, life: LifeLine) -> None:
    process, folder, shared = messy(tmp_path, life)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert becomes_true(lambda: process.exit_status == 128 + signal.SIGKILL, 10)
    assert not folder.exists()
    shared.unlink(missing_ok=True)  # whose tracker may have been killed with the rest


def test_the_temporary_folder_has_a_path_short_enough_for_sockets(
    tmp_path: Path, life: LifeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    for place in (tempfile.gettempdir(), str(deep)):
        monkeypatch.setattr(tempfile, "tempdir", place)
        process = started(tmp_path, life, SOCKET)
        assert becomes_true(lambda process=process: process.exit_status is not None, 10)  # type: ignore[misc]
        assert process.exit_status == 0, process.log_text()


def test_a_second_start_reads_only_its_own_log(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life, "import os; print(os.getpid())")
    assert becomes_true(lambda: process.exit_status == 0, 10)
    first = process.log_text()
    process.start()
    assert becomes_true(lambda: process.exit_status == 0, 10)
    assert process.log_text() != first
    assert process.log.read_text() == first + process.log_text()
