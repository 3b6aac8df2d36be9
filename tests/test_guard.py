"""Nothing that a guarded command started outlives it, or outlives whoever started it, however they end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from real.serving.guarded_process import GuardedProcess, LifeLine, child_environment
from tests.kit.process_tree import becomes_true, is_alive, processes_of_group

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


def test_when_the_life_line_closes_everything_ends(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life)
    family = family_of(process)
    life.close()
    assert all_gone(family)
    assert becomes_true(lambda: process.exit_status == 128 + signal.SIGKILL, 10)


def test_when_the_one_who_started_it_is_killed_everything_ends(tmp_path: Path) -> None:
    starter = (
        "import sys, time; from pathlib import Path; from real.serving.guarded_process import *;"
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


def test_a_second_start_reads_only_its_own_log(tmp_path: Path, life: LifeLine) -> None:
    process = started(tmp_path, life, "import os; print(os.getpid())")
    assert becomes_true(lambda: process.exit_status == 0, 10)
    first = process.log_text()
    process.start()
    assert becomes_true(lambda: process.exit_status == 0, 10)
    assert process.log_text() != first
    assert process.log.read_text() == first + process.log_text()
