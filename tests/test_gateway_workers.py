"""Several workers share one port; what is bounded is bounded for their sum, because each takes its share."""

import asyncio
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from real.gateway.replicas import Routing
from tests.kit.client import Client
from tests.kit.processes import config_for, until
from tests.kit.scene import scene


@pytest.mark.parametrize("workers", [2, 3])
def test_cap_and_queue_of_all_workers_hold_for_their_sum(tmp_path: Path, workers: int) -> None:
    cap, bound, everyone = 7, 5, 200
    limits = {"max_in_flight_per_replica": cap, "max_queued_per_expert": bound}
    with scene(tmp_path, behaviour={"ttft_s": 60.0}, router={"workers": workers}, limits=limits) as fleet:

        async def story(client: Client) -> None:
            requests = [asyncio.create_task(client.complete("code")) for _ in range(everyone)]
            await until(lambda: sum(request.done() for request in requests) == everyone - cap - bound)
            await until(lambda: fleet.experts["code"][0].state()["running"] == cap)  # the last may be on their way
            assert fleet.experts["code"][0].state()["running_max"] == cap
            assert fleet.gateway.total("inflight") == cap
            assert fleet.gateway.total("queue_depth") == bound
            for connection in list(client.open):
                connection.leave()
            replies = await asyncio.gather(*requests)
            refused = [reply for reply in replies if reply.status == 429]
            assert len(refused) == everyone - cap - bound
            assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)

        fleet.play(story)
        fleet.check_ledger()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_expert_gets_as_many_as_saturate_it_before_workers_spill_over(tmp_path: Path, workers: int) -> None:
    router = {"policy": "class_with_spill_over", "workers": workers}
    bounds = {"code": 10, "talk": 1000}
    with scene(
        tmp_path,
        {"code": 1, "talk": 1},
        {"ttft_s": 60.0},
        router=router,
        class_map={"code": ["code", "talk"]},
        saturated_at=bounds,
    ) as fleet:

        async def story(client: Client) -> None:
            requests = [asyncio.create_task(client.complete("code")) for _ in range(150)]
            await until(lambda: fleet.gateway.total("inflight") == 150)
            assert fleet.gateway.total("inflight", expert="code") == 10
            for connection in list(client.open):
                connection.leave()
            await asyncio.gather(*requests)

        fleet.play(story)
        fleet.check_ledger()


@given(bound=st.floats(0.5, 50), replicas=st.integers(1, 4), workers=st.integers(1, 4))
def test_workers_take_together_what_one_would_before_it_spills_over(bound: float, replicas: int, workers: int) -> None:
    urls = [f"http://127.0.0.1:{1 + index}" for index in range(replicas)]
    config = config_for(
        {"code": urls, "talk": urls},
        router={"policy": "class_with_spill_over", "workers": workers},
        class_map={"code": ["code", "talk"]},
        saturated_at={"code": bound},
    )
    taken = 0
    for worker in range(workers):
        routing = Routing(config, worker, lambda: 0.0)
        for replica in routing.replicas:
            replica.health.begin(True)
        while (chosen := routing.choose(routing.of_class(0), 0.0)) is not None and chosen.expert == 0:
            routing.send_to(chosen)
            taken += 1
    assert taken == max(workers, math.ceil(bound * replicas))
