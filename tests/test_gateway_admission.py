import asyncio
import random as random_module
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from real.gateway.admission import Admission
from real.gateway.config import share_of
from real.gateway.error_events import Refusal
from real.gateway.replicas import Place, Routing
from sim.replica_health import LONGEST_WAIT_S
from sim.usable_replicas import Wish
from tests.kit.processes import CLASSES, config_for

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


class Hall:
    """An admission with a clock of its own, and the account of everyone who came."""

    def __init__(self, policy: str, cap: int, bound: int) -> None:
        limits = {"max_in_flight_per_replica": cap, "max_queued_per_expert": bound}
        config = config_for({"code": URLS, "talk": URLS[:1]}, router={"policy": policy}, limits=limits)
        self.routing = Routing(config, 0, random_module.Random(1).random)
        for replica in self.routing.replicas:
            replica.health.begin(True)
        self.now_s = 0.0
        self.admission = Admission(self.routing, queue_bound=bound, queue_s=1e6, clock=lambda: self.now_s)
        self.cap, self.bound = cap, bound
        self.inside: list[tuple[int, Place]] = []
        self.waiting: dict[int, asyncio.Task[Place]] = {}
        self.arrived = 0
        self.ended: Counter[str] = Counter()

    async def step(self, action: str, pick: int) -> None:
        replica = self.routing.replicas[pick % len(self.routing.replicas)]
        if action == "arrive":
            wish = self.routing.of_class(pick % len(CLASSES))
            self.waiting[self.arrived] = asyncio.create_task(self.admission.place(wish))
            self.arrived += 1
        elif action == "finish" and self.inside:
            _, place = self.inside.pop(pick % len(self.inside))
            self.admission.release(place)
            self.ended["finished"] += 1
        elif action == "leave" and self.waiting:
            number = sorted(self.waiting)[pick % len(self.waiting)]
            self.waiting[number].cancel()
        elif action == "fail":
            replica.health.failed(replica.health.ejections, self.now_s)
            self.admission.hand_out()
        elif action == "heal":
            self.now_s += LONGEST_WAIT_S
            for _ in range(2):
                replica.health.checked(True, self.now_s)
            replica.health.answered(replica.health.ejections, self.now_s)
            self.now_s += 2
            self.admission.hand_out()
        for _ in range(4):
            await asyncio.sleep(0)
        for number, task in list(self.waiting.items()):
            if task.done():
                del self.waiting[number]
                if task.cancelled():
                    self.ended["left"] += 1
                elif isinstance(error := task.exception(), Refusal):
                    self.ended[error.outcome] += 1
                else:
                    self.inside.append((number, task.result()))

    def check(self) -> None:
        """Conservation, caps and bounds; nobody waits while there is a place."""
        assert self.arrived == sum(self.ended.values()) + len(self.inside) + len(self.waiting)
        assert sum(self.admission.queued) == len(self.waiting)
        counts = Counter(id(place.replica) for _, place in self.inside)
        for replica in self.routing.replicas:
            assert replica.outstanding == counts[id(replica)] <= self.cap
        assert all(queued <= self.bound for queued in self.admission.queued[:-1])
        for line, queued in enumerate(self.admission.queued[:-1]):
            if queued:
                assert self.routing.choose(Wish((line,)), self.now_s) is None


STEPS = st.lists(
    st.tuples(st.sampled_from(["arrive", "arrive", "arrive", "finish", "leave", "fail", "heal"]), st.integers(0, 50)),
    max_size=60,
)


@given(
    steps=STEPS,
    policy=st.sampled_from(["class", "class_with_spill_over", "least_outstanding", "round_robin"]),
    cap=st.integers(1, 3),
    bound=st.integers(0, 4),
)
@settings(max_examples=200, deadline=None)
def test_s1_requests_are_conserved_and_caps_hold_at_every_step(steps: Any, policy: str, cap: int, bound: int) -> None:
    async def story() -> None:
        hall = Hall(policy, cap, bound)
        for action, pick in steps:
            await hall.step(action, pick)
            hall.check()
        for task in hall.waiting.values():
            task.cancel()
        await asyncio.gather(*hall.waiting.values(), return_exceptions=True)
        assert sum(hall.admission.queued) == 0

    asyncio.run(story())


def test_who_waits_is_served_in_order_of_arrival() -> None:
    async def story() -> None:
        hall = Hall("class", 1, 4)
        for _ in range(5):
            await hall.step("arrive", 0)
        assert [number for number, _ in hall.inside] == [0, 1]
        for _ in range(3):
            await hall.step("finish", 0)
        assert [number for number, _ in hall.inside] == [3, 4]

    asyncio.run(story())


def test_shares_of_workers_add_up() -> None:
    assert [share_of(10, worker, 4) for worker in range(4)] == [3, 3, 2, 2]
