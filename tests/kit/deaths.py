"""G2: one of four experts dies while streams are open; what the streams and the next requests to it come to."""

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any

from tests.kit.client import Client, Reply, Settled
from tests.kit.processes import CLASSES, ROOT, until
from tests.kit.scene import Scene

VICTIM = "talk"


@dataclass(frozen=True)
class Death:
    """What one death came to.

    Attributes:
        dead: the victim's streams.
        others: those of the other experts.
        killed_s: by ``time.monotonic``.
        asked: what a process of its own that asked for the victim from then on was told, and when.
        inside_s: from the arrival of the first such request in the gateway to its answer, by the gateway's own clock.
        told_before: how many of the victim's streams were told in that time.
    """

    dead: list[Reply]
    others: list[Reply]
    killed_s: float
    asked: list[dict[str, Any]]
    inside_s: float
    told_before: int

    @property
    def told(self) -> int:
        """Streams of the victim that ended with exactly one error event and ``[DONE]``."""
        return sum((reply.end, reply.errors, reply.is_done) == ("clean", 1, True) for reply in self.dead)

    @property
    def told_within_s(self) -> float:
        return max(reply.ended_s for reply in self.dead) - self.killed_s


async def kill_one_of_four(fleet: Scene, client: Client, streams: int, tokens: int) -> Death:
    """Open streams to four experts, kill one and ask for it at once."""
    tasks = [
        asyncio.create_task(client.complete(f"{CLASSES[index % 4]} {index}", max_tokens=tokens))
        for index in range(streams)
    ]
    replies = client.replies
    await until(lambda: len(replies) == streams and all(reply.times_s for reply in replies), timeout_s=60)
    probe = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.kit.probe", "--pid", str(fleet.experts[VICTIM][0].pid)),
        *("--port", str(fleet.gateway.port), "--prompt", f"{VICTIM} now"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await probe.communicate()
    killed, *asked = [json.loads(line) for line in output.splitlines()]
    fleet.settled += [Settled(line["id"], "/v1/completions", "clean", f"failed: {line['status']}") for line in asked]
    await asyncio.gather(*tasks)
    by_victim = [reply.headers["x-expert-router-expert"] == VICTIM for reply in replies]
    dead = [reply for reply, its in zip(replies, by_victim, strict=True) if its]
    others = [reply for reply, its in zip(replies, by_victim, strict=True) if not its]
    log = {line["request_id"]: line for line in fleet.gateway_log()}
    next_ = log[asked[0]["id"]]
    told_before = sum(next_["arrived_s"] < log[reply.request_id]["ended_s"] < next_["ended_s"] for reply in dead)
    return Death(dead, others, killed["killed_s"], asked, next_["ended_s"] - next_["arrived_s"], told_before)
