"""CPU seconds and memory of whole commands, start-up included: ``python -m benchmarks.speed``.

Each line is one process started as a user would start it; its CPU time and peak memory are what the operating system
accounted to it and its children.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


class Cost(NamedTuple):
    """What a process took."""

    cpu_s: float
    wall_s: float
    peak_mb: float


def cost_of(*arguments: str) -> Cost:
    """Run ``expert-router`` with these arguments, its output thrown away, and return what it took.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", "from sim.cli import main; main()", *arguments]
    started = time.perf_counter()
    with Path(os.devnull).open("w") as nowhere:
        process = os.posix_spawn(
            sys.executable,
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1), (os.POSIX_SPAWN_DUP2, nowhere.fileno(), 2)],
        )
        _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(
            f"expert-router {' '.join(arguments)} failed with status {os.waitstatus_to_exitcode(status)}"
        )
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1024)


def closed_loop_file(folder: Path, *, users: int, requests: int, experts: int, output_tokens: int = 128) -> str:
    """Write ``closed_loop.yaml`` with these numbers, one class an expert, and return its path."""
    file = yaml.safe_load((HERE / "closed_loop.yaml").read_text())
    names = [f"e{i}" for i in range(experts)]
    workload, fleet = file["workload"], file["fleets"]["fleet"]
    workload["classes"] = {name: workload["classes"]["any"] | {"output_tokens": output_tokens} for name in names}
    workload["load"]["users"] = users
    file["run"]["requests"] = requests
    fleet["experts"] = dict.fromkeys(names, fleet["experts"]["any"])
    if experts > 1:
        fleet["router"] = {"workers": max(4, experts)}
    path = folder / f"{users}-{requests}-{experts}-{output_tokens}.yaml"
    path.write_text(yaml.safe_dump(file))
    return str(path)


def main() -> None:
    """Run every line and print the table."""
    table = Table("command", "CPU s", "wall s", "peak MB", "target", title="speed and memory, start-up included")
    for column in table.columns[1:4]:
        column.justify = "right"
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def loop(users: int, requests: int, experts: int, output_tokens: int = 128) -> tuple[str, ...]:
            path = closed_loop_file(
                folder, users=users, requests=requests, experts=experts, output_tokens=output_tokens
            )
            return "simulate", path, "--workers", "1"

        lines: list[tuple[str, tuple[str, ...], str]] = [
            ("--help", ("--help",), "0.3 s CPU"),
            ("simulate (packaged fleet)", ("simulate",), "3 s"),
            ("100,000 requests, 1,000 users, 1 expert", loop(1000, 100_000, 1), "2.5 s CPU, 300 MB"),
            ("100,000 requests, 1,000 users, 8 experts", loop(1000, 100_000, 8), "2.5 s CPU, 300 MB"),
            ("  half the requests", loop(1000, 50_000, 8), "about half"),
            ("  64 output tokens", loop(1000, 100_000, 8, 64), ""),
            ("  1,024 output tokens", loop(1000, 100_000, 8, 1024), "under 1.5 times that of 64"),
            ("1,000,000 requests, 10,000 users, 64 experts", loop(10_000, 1_000_000, 64), "40 s CPU, 1,500 MB"),
            ("simulate examples/paper.yaml", ("simulate", str(EXAMPLES / "paper.yaml")), "20 s wall on 2 cores"),
        ]
        for label, arguments, target in lines:
            console.print(f"running: {label.strip()}", style="dim")
            cost = cost_of(*arguments)
            table.add_row(label, f"{cost.cpu_s:.2f}", f"{cost.wall_s:.2f}", f"{cost.peak_mb:,.0f}", target)
    console.print(table)


if __name__ == "__main__":
    main()
