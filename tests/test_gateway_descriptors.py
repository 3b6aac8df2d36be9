"""What a worker does when no file descriptor is left: real connections fill a real limit."""

import asyncio
import resource
from pathlib import Path

from tests.kit.client import Client
from tests.kit.processes import cpu_s, open_files, until
from tests.kit.scene import scene

SPARE = 20
LONG = "word " * 20_000 + "talk"


def test_without_file_descriptors_streams_go_on_and_the_rest_waits(tmp_path: Path) -> None:
    with scene(tmp_path, {"code": 1, "talk": 1}, {"itl_s": 0.05}) as fleet:

        async def story(client: Client) -> None:
            worker = fleet.gateway.workers()[0]
            kept = Client(fleet.gateway.port)
            kept.replies = client.replies
            assert (await kept.complete("code")).outcome == "completed"
            streams = [asyncio.create_task(client.complete("code", max_tokens=120)) for _ in range(20)]
            await until(lambda: fleet.experts["code"][0].state()["running"] == 20)
            highest = max(int(path.name) for path in Path(f"/proc/{worker}/fd").iterdir())
            before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 1 + SPARE, before[1]))

            idle = [await asyncio.open_connection("127.0.0.1", fleet.gateway.port) for _ in range(3 * SPARE)]
            await until(lambda: "cannot accept" in fleet.gateway.error_text())
            late = asyncio.create_task(client.complete("talk"))
            used_s, seconds = cpu_s(worker), 2.5  # long enough for two checks of each expert's health
            await asyncio.sleep(seconds)
            share = (cpu_s(worker) - used_s) / seconds
            print(f"descriptors: {open_files(worker)} open, {share:.2f} of a core used with 20 streams")
            assert share < 0.4
            assert not late.done()
            refused = await kept.complete("talk")
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert "too many files open" in refused.json["error"]["message"]
            assert (await kept.complete(LONG)).status == 429  # the classifier's helper process cannot be started
            assert not any(stream.done() for stream in streams)

            for _, writer in idle:
                writer.transport.abort()
            assert (await late).outcome == "completed"
            assert {reply.outcome for reply in await asyncio.gather(*streams)} == {"completed"}
            assert [(await kept.complete(prompt)).outcome for prompt in ("talk", LONG)] == ["completed"] * 2
            kept.close()
            assert fleet.gateway.total("ejections_total") == 0
            assert fleet.gateway.workers() == [worker]
            said = fleet.gateway.error_text()
            assert said.count("cannot accept connections for now: Too many open files") == 1, said
            assert said.count("accepts connections again") == 1, said

        fleet.play(story)
        fleet.check_ledger()
