"""Each self-check notices a run that breaks its law in one place, and passes one that does not."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import nan
from typing import Any

import numpy as np
import pytest

from sim.kv_cache import KvCache
from sim.recorder import Recorder
from sim.records import COMPLETED, IN_FLIGHT
from sim.replica import Replica
from sim.request import Request
from sim.self_checks import Occupancy, SelfCheckError
from sim.simulation import RunPlan, Simulation
from sim.spec import ClassSpec, ClosedLoop, RunSpec, Trace, Uniform, WorkloadSpec
from sim.traffic import TraceTable, WorkloadData
from tests.fleets import FREE, FREE_ROUTER, ROOMY, AffineCurve, make_expert, make_plan

TRACED = 50  # requests
TOKENS = Uniform(min=1, max=60)


def drained() -> RunPlan:
    """A trace replayed whole, through stations that all queue and a pool so small that requests are preempted."""
    rng = np.random.default_rng(1)
    table = TraceTable(
        arrival_s=np.cumsum(rng.exponential(0.02, TRACED)),
        prompt_tokens=rng.integers(1, 60, TRACED),
        output_tokens=rng.integers(1, 60, TRACED),
    )
    expert = make_expert(
        AffineCurve(fixed_s=0.01, per_request_s=1e-3, per_kv_token_s=1e-5),
        engine=replace(ROOMY, num_kv_blocks=12, max_model_len=150, max_num_seqs=8, max_num_batched_tokens=64),
        front_end=replace(FREE, per_request_s=0.01, per_output_token_s=1e-4),
    )
    router = FREE_ROUTER.model_copy(
        update={"workers": 2, "per_request_s": 0.03, "user_network_s": 0.01, "expert_network_s": 0.005}
    )
    return make_plan(
        expert,
        Trace(file="trace.csv", format="azure"),
        at=nan,
        router=router,
        run=RunSpec(),
        data=WorkloadData(trace=table),
    )


def cut_off() -> RunPlan:
    """The same fleet under users who are interrupted with requests everywhere on their way."""
    workload = WorkloadSpec(
        classes={"class": ClassSpec(prompt_tokens=TOKENS, output_tokens=TOKENS)}, load=ClosedLoop(users=30)
    )
    return replace(drained(), workload=workload, run=RunSpec(duration_s=3.0), data=WorkloadData(), load=30.0)


@pytest.fixture(params=[drained, cut_off], ids=["drained", "cut off"])
def simulation(request: pytest.FixtureRequest) -> Simulation:
    make: Callable[[], RunPlan] = request.param
    return Simulation(make())


def assert_noticed(simulation: Simulation, what: str) -> None:
    with pytest.raises(SelfCheckError, match=f"^self-check failed, please report this as a defect.*: .*{what}"):
        simulation.run()


Tampering = Callable[[Recorder, Request, int], None]


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the recorder do something else with the fifth request of a status."""
    add = Recorder.add

    def with_one(instead: Tampering, status: int = COMPLETED) -> None:
        number = count(1)

        def tampered(recorder: Recorder, request: Request, its_status: int) -> None:
            if its_status == status and next(number) == 5:
                instead(recorder, request, its_status)
            else:
                add(recorder, request, its_status)

        monkeypatch.setattr(Recorder, "add", tampered)

    return with_one


def recorded_with(shift_s: float, *names: str) -> Tampering:
    add = Recorder.add

    def shifted(recorder: Recorder, request: Request, status: int) -> None:
        for name in names:
            setattr(request, name, getattr(request, name) + shift_s)
        add(recorder, request, status)

    return shifted


def test_a_sound_run_passes_and_says_what_was_found(simulation: Simulation) -> None:
    record = simulation.run()
    assert set(record.checks) == {"conservation", "order", "little, system", "little, router", "little, engines"}
    assert record.checks["order"] == f"{len(record.requests['sent_s'])} requests"
    assert record.requests["preemptions"].sum() > 0


def test_a_fleet_without_a_router_is_not_asked_about_one() -> None:
    plan = drained()
    record = Simulation(replace(plan, fleet=replace(plan.fleet, router=None))).run()
    assert set(record.checks) == {"conservation", "order", "little, system", "little, engines"}


# ----------------------------------------------------------------------------------------------------- conservation


def test_a_lost_request_is_noticed(simulation: Simulation, tamper: Callable[..., None]) -> None:
    tamper(lambda recorder, request, status: None)
    assert_noticed(simulation, "requests entered and .* ended, but recorded are")


def test_a_lost_request_in_flight_is_noticed(tamper: Callable[..., None]) -> None:
    tamper(lambda recorder, request, status: None, IN_FLIGHT)
    assert_noticed(Simulation(cut_off()), "")


def test_a_request_recorded_twice_is_noticed(simulation: Simulation, tamper: Callable[..., None]) -> None:
    add = Recorder.add

    def twice(recorder: Recorder, request: Request, status: int) -> None:
        add(recorder, request, status)
        add(recorder, request, status)

    tamper(twice)
    assert_noticed(simulation, "a request is recorded twice")


def test_an_answered_request_recorded_as_in_flight_is_noticed(
    simulation: Simulation, tamper: Callable[..., None]
) -> None:
    add = Recorder.add
    tamper(lambda recorder, request, status: add(recorder, request, IN_FLIGHT))
    assert_noticed(simulation, "requests entered and .* ended, but recorded are")


# ------------------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(
    "name",
    [
        "router_start_s",
        "router_end_s",
        "front_end_start_s",
        "engine_arrival_s",
        "scheduled_s",
        "first_token_engine_s",
        "first_token_s",
        "last_token_s",
    ],
)
def test_a_time_before_the_one_it_follows_is_noticed(
    simulation: Simulation, tamper: Callable[..., None], name: str
) -> None:
    tamper(recorded_with(-100.0, name))
    assert_noticed(simulation, f"{name} of request .* lies too early")


# ------------------------------------------------------------------------------------------------------ Little's law


class Forgetful(Occupancy):
    """Misses the fifth change."""

    calls: Any = None

    def change(self, now_s: float, by: int) -> None:
        self.calls = self.calls or count(1)
        if next(self.calls) != 5:
            super().change(now_s, by)


@pytest.mark.parametrize(("where", "what"), [("in_system", "the system"), ("at_router", "the router")])
def test_an_arrival_or_departure_not_counted_is_noticed(simulation: Simulation, where: str, what: str) -> None:
    setattr(simulation.counted, where, Forgetful())
    assert_noticed(simulation, f"Little's law in {what}")


@pytest.mark.parametrize(
    ("shift_s", "name", "what"),
    [
        (-1e-3, "sent_s", "the system"),
        (1e-3, "last_token_s", "the system"),
        (-1e-3, "router_end_s", "the router"),
    ],
)
def test_a_time_that_is_a_little_off_is_noticed(
    simulation: Simulation, tamper: Callable[..., None], shift_s: float, name: str, what: str
) -> None:
    tamper(recorded_with(shift_s, name))
    assert_noticed(simulation, f"Little's law in {what}")


def test_a_request_scheduled_at_another_time_than_the_engine_says_is_noticed(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, number = Replica._note_admission, count(1)

    def noted(replica: Replica, request: Request, now_s: float) -> None:
        note(replica, request, now_s)
        if next(number) == 5:
            request.scheduled_s += 1e-3

    monkeypatch.setattr(Replica, "_note_admission", noted)
    assert_noticed(simulation, "Little's law in replica 0 of expert")


def test_a_preempted_request_that_does_not_wait_is_noticed(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, number = Replica._note_preemption, count(1)

    def noted(replica: Replica, request: Request, now_s: float) -> None:
        note(replica, request, now_s)
        if next(number) == 5:
            request.queued_since_s += 1e-3

    monkeypatch.setattr(Replica, "_note_preemption", noted)
    assert_noticed(simulation, "Little's law in replica 0 of expert")


# -------------------------------------------------------------------------------------------------------- KV blocks


@pytest.mark.parametrize(("name", "leak"), [("take", 1), ("give_back", 1), ("take", -1), ("give_back", -1)])
def test_a_leaking_pool_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str, leak: int) -> None:
    change, number = getattr(KvCache, name), count(1)

    def leaking(cache: KvCache, *args: Any) -> None:
        change(cache, *args)
        if next(number) == 5:
            cache.free -= leak

    monkeypatch.setattr(KvCache, name, leaking)
    assert_noticed(Simulation(drained()), r"KV blocks of replica 0 of expert: 1[13] of 12 free, 0 requests running")
