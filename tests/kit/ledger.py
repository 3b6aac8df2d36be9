"""The ledger of client and gateway: each request that was sent has exactly one outcome, the same on both sides."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tests.kit.client import Reply, Settled


def check_ledger(
    replies: Iterable[Reply | Settled], gateway_log: Iterable[Mapping[str, Any]], *, worker_killed: bool = False
) -> Counter[str]:
    """Hold both sides together; return how many requests had which outcome by the client's account.

    Args:
        replies: what the clients saw of completion requests.
        gateway_log: lines of the gateway's request log.
        worker_killed: a worker of the gateway died with what it had under way, and wrote nothing of it.
    """
    replies = list(replies)
    lines: dict[str, list[str]] = {}
    for line in gateway_log:
        lines.setdefault(line["request_id"], []).append(line["outcome"])
    sent = {reply.request_id for reply in replies}
    assert len(sent) == len(replies), "two requests of one id"
    for reply in replies:
        own = lines.get(reply.request_id, [])
        lost = reply.outcome == "cancelled" or reply.end == "refused" or (worker_killed and reply.end == "cut")
        assert len(own) == 1 or (not own and lost), f"{reply}: gateway says {own}"
        if reply.outcome == "completed":
            assert own == ["completed"], f"{reply.request_id}: client has it all, gateway says {own}"
        elif own == ["completed"]:
            assert lost, f"{reply.request_id}: gateway completed, client {reply.outcome}"
    assert set(lines) <= sent, f"gateway has answered what nobody sent: {set(lines) - sent}"
    return Counter(reply.outcome for reply in replies)
