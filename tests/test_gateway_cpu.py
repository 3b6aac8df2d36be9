import asyncio
from pathlib import Path

from tests.kit.client import Client
from tests.kit.processes import Splice, cpu_s, running
from tests.kit.scene import scene

STREAMS, CHUNKS, ITL_S = 100, 100, 0.01
RATIO = 1.3
"""CPU of the gateway per chunk, over that of a bare splice of the same streams at the same time."""


def test_p4_a_chunk_costs_little_more_than_a_bare_splice(tmp_path: Path) -> None:
    with scene(tmp_path, {"code": 1}, {"itl_s": ITL_S}) as fleet:
        splice = Splice(fleet.experts["code"][0])
        ratios = []

        async def story(client: Client) -> None:
            other = Client(splice.port)
            worker = fleet.gateway.workers()[0]

            async def streams(through: Client) -> None:
                replies = await asyncio.gather(
                    *(through.complete("code", max_tokens=CHUNKS, model="code") for _ in range(STREAMS))
                )
                assert {reply.outcome for reply in replies} == {"completed"}

            for _ in range(3):
                before_s = cpu_s(worker), cpu_s(splice.pid)
                await asyncio.gather(streams(client), streams(other))
                used_s = cpu_s(worker) - before_s[0], cpu_s(splice.pid) - before_s[1]
                ratios.append(used_s[0] / used_s[1])
                us = [seconds / (STREAMS * CHUNKS) * 1e6 for seconds in used_s]
                print(f"P4: {us[0]:.1f} us a chunk, bare splice {us[1]:.1f} us, ratio {ratios[-1]:.2f}")
            other.close()

        with running(splice):
            fleet.play(story)
        assert min(ratios) < 1.25 * RATIO
