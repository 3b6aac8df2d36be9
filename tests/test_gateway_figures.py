import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from real.gateway.figures import Figure, read_figures
from tests.kit.client import Client
from tests.kit.processes import ROOT
from tests.kit.scene import scene

_COUNTS = """
import os, sys
from pathlib import Path
from real.gateway.figures import FiguresFile
file = FiguresFile(Path(sys.argv[1]))
rows = [file.row("many", (str(index),), 7) for index in range(300)]
for row in rows:
    row[0] += 1
    row[6] = 2.5
print("written", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_loses_no_count(tmp_path: Path) -> None:
    path = tmp_path / "7"
    with subprocess.Popen(
        [sys.executable, "-c", _COUNTS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        living = read_figures(path)
        writer.send_signal(signal.SIGKILL)
    assert living == read_figures(path) == {Figure("many", (str(i),)): [1, 0, 0, 0, 0, 0, 2.5] for i in range(300)}


def test_counts_of_a_dead_worker_stay_and_its_gauges_go(tmp_path: Path) -> None:
    with scene(tmp_path, behaviour={"itl_s": 0.02}) as fleet:

        async def story(client: Client) -> None:
            for _ in range(5):
                await client.complete("code", max_tokens=2)
            stream = asyncio.create_task(client.complete("code", max_tokens=1000))
            await asyncio.sleep(0.3)
            assert fleet.gateway.total("inflight") == 1
            worker = fleet.gateway.workers()[0]
            os.kill(worker, signal.SIGKILL)
            assert (await stream).outcome == "failed: cut"
            while fleet.gateway.workers() in ([], [worker]):
                await asyncio.sleep(0.05)
            assert fleet.gateway.total("inflight") == 0
            assert fleet.gateway.total("requests_received_total") == 6
            assert fleet.gateway.total("requests_total", outcome="completed") == 5
            assert fleet.gateway.total("e2e_seconds_bucket", le="+Inf") == 5

        fleet.play(story)
