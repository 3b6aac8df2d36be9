"""How steady this machine is, and what a busy neighbour costs: ``python -m benchmarks.steadiness``.

A prediction is compared with an engine that runs minutes after it was measured, beside other engines. What a core's
speed does in those minutes, and what the work of other cores takes from it, no prediction can know: this measures both
with fixed computations, each in a process confined to one core. Nothing else may run meanwhile.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from itertools import cycle
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
from rich.table import Table
from threadpoolctl import threadpool_limits

from sim.report import BOX, wide_console

TURN_S = 0.2
"""A neighbour is busy and idle in turns of so long: short beside the machine's own ups and downs."""
WINDOWS_S = (1.0, 10.0)


def small_matrices() -> Callable[[], object]:
    """Products of what the core's own cache holds."""
    matrix = np.ones((160, 160), np.float32)
    return lambda: matrix @ matrix


def memory() -> Callable[[], object]:
    """One matrix after the other times a vector, 160 MB in turn: what decoding does."""
    matrices = cycle(np.ones((40, 1000, 1000), np.float32))
    vector = np.ones(1000, np.float32)
    return lambda: next(matrices) @ vector


def python() -> Callable[[], object]:
    """Adding up numbers, one at a time."""
    return lambda: sum(number * number for number in range(2000))


COMPUTATIONS = {"small matrices": small_matrices, "memory": memory, "Python": python}


def speeds(core: int, what: str, seconds: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the computations a second in each turn of TURN_S."""
    os.sched_setaffinity(0, {core})
    compute = COMPUTATIONS[what]()
    compute()
    found = []
    for _ in range(round(seconds / TURN_S)):
        done, began_s = 0, time.perf_counter()
        while (took_s := time.perf_counter() - began_s) < TURN_S:
            compute()
            done += 1
        found.append(done / took_s)
    return np.array(found)


def _keep_busy(core: int, what: str, busy: Event, over: Event) -> None:
    os.sched_setaffinity(0, {core})
    compute = COMPUTATIONS[what]()
    while not over.is_set():
        if busy.is_set():
            compute()
        else:
            time.sleep(0.001)


def beside_neighbour(core: int, neighbour: int, what: str, its: str, seconds: float) -> tuple[float, float]:
    """Return how much longer a computation takes while a neighbour computes, as a share, and its standard error."""
    busy, over = multiprocessing.Event(), multiprocessing.Event()
    process = multiprocessing.Process(target=_keep_busy, args=(neighbour, its, busy, over))
    process.start()
    try:
        os.sched_setaffinity(0, {core})
        compute = COMPUTATIONS[what]()
        time.sleep(1.0)
        took_s = []
        for turn in range(round(seconds / TURN_S)):
            (busy.set if turn % 2 else busy.clear)()
            time.sleep(0.005)  # the neighbour looks once a millisecond
            done, began_s = 0, time.perf_counter()
            while (passed_s := time.perf_counter() - began_s) < TURN_S:
                compute()
                done += 1
            took_s.append(passed_s / done)
    finally:
        over.set()
        process.join()
    logs = np.log(np.array(took_s[: len(took_s) // 2 * 2]).reshape(-1, 2))
    longer = logs[:, 1] - logs[:, 0]
    return float(np.expm1(longer.mean())), float(longer.std(ddof=1) / len(longer) ** 0.5)


def main() -> None:
    """Print how far each core's speed wanders, and what a busy neighbour costs."""
    threadpool_limits(1)  # the library of matrix products would use all cores
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    options = parser.parse_args()
    console = wide_console()
    cores = sorted(os.sched_getaffinity(0))
    table = Table(title="standard deviation of a core's speed", title_justify="left", box=BOX, title_style="bold")
    table.add_column("core")
    table.add_column("computation")
    for window_s in WINDOWS_S:
        table.add_column(f"over {window_s:g} s", justify="right")
    for core in cores[:2]:
        for what in COMPUTATIONS:
            found = speeds(core, what, options.seconds)
            shares = []
            for window_s in WINDOWS_S:
                size = round(window_s / TURN_S)
                means = found[: len(found) // size * size].reshape(-1, size).mean(axis=1)
                shares.append(f"{means.std(ddof=1) / means.mean():.1%}" if len(means) > 1 else "-")
            table.add_row(str(core), what, *shares)
    console.print(table)
    if len(cores) < 2:
        console.print("one core: no neighbour")
        return
    title = f"how much longer a computation takes on core {cores[0]} while core {cores[1]} computes"
    table = Table(title=title, title_justify="left", box=BOX, title_style="bold")
    table.add_column("computation")
    for its in COMPUTATIONS:
        table.add_column(f"beside {its}", justify="right")
    for what in COMPUTATIONS:
        cells = [beside_neighbour(cores[0], cores[1], what, its, options.seconds) for its in COMPUTATIONS]
        table.add_row(what, *(f"{longer:+.1%} ± {error:.1%}" for longer, error in cells))
    console.print(table)


if __name__ == "__main__":
    main()
