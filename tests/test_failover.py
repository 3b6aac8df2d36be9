"""Replicas die in a simulated fleet: who fails, who is tried again, and that nothing is lost or made up."""

from collections import Counter
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sim import parse_fleet, simulate
from sim.fleet import Outage
from sim.mistakes import FleetFileError
from sim.records import COMPLETED, FAILED, IN_FLIGHT, RunRecord
from sim.serve_spec import HealthSpec, LimitSpec
from sim.simulation import RunPlan, Simulation
from sim.spec import ClassSpec, ClosedLoop, Fixed, OpenLoop, RunSpec
from tests.fleets import FREE_ROUTER, ROOMY, AffineCurve, make_expert, make_plan
from tests.strategies import plans

random_fleets = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SYNCHRONOUS = replace(ROOMY, async_scheduling=False)


@st.composite
def plans_with_outages(draw: st.DrawFn, /, **options: Any) -> RunPlan:
    """Plans behind a router whose replicas die now and then, some for good."""
    plan = draw(plans(**options).filter(lambda plan: plan.fleet.router is not None))
    outages = []
    for index, expert in enumerate(plan.fleet.experts):
        for replica in range(expert.replicas):
            at_s = 0.0
            for _ in range(draw(st.integers(0, 2))):
                at_s += draw(st.integers(1, 9999)) / 1234
                for_s = draw(st.integers(1, 9999)) / 3456
                outages.append(Outage(expert_index=index, replica_index=replica, at_s=at_s, for_s=for_s))
                at_s += for_s
            if draw(st.booleans()) and draw(st.booleans()):
                outages.append(Outage(expert_index=index, replica_index=replica, at_s=at_s + 0.1, for_s=inf))
    health = HealthSpec(interval_s=draw(st.sampled_from([0.05, 0.5])), reopen_s=draw(st.sampled_from([0.1, 1.0])))
    limits = LimitSpec(retry_share=draw(st.sampled_from([0.0, 0.1, 1.0])))
    fleet = replace(plan.fleet, outages=tuple(outages), health=health, limits=limits)
    run = plan.run if plan.run.requests is None else RunSpec(duration_s=8.0, seed=plan.run.seed)
    return replace(plan, fleet=fleet, run=run)


@random_fleets
@given(plans_with_outages())
def test_every_request_has_one_outcome_however_replicas_die(plan: RunPlan) -> None:
    simulation = Simulation(plan)
    requests = simulation.run().requests  # which checks conservation, order, Little's law and blocks of itself
    status, http = requests["status"], requests["http_status"]
    assert len(np.unique(requests["request_id"])) == len(status)
    assert set(http[status == COMPLETED]) <= {200}
    assert set(http[status == FAILED]) <= {200, 400, 502, 503}
    assert set(http[status == IN_FLIGHT]) <= {0, 200}
    broke_off = (status == FAILED) & (http == 200)
    assert not np.isnan(requests["first_token_s"][broke_off]).any()
    assert np.isnan(requests["first_token_s"][(status == FAILED) & (http != 200)]).all()
    for replica in simulation.replicas:
        here = (requests["expert_index"] == replica.expert_index) & (requests["replica_index"] == replica.replica_index)
        assert replica.outstanding == np.count_nonzero(here & (status == IN_FLIGHT))


@random_fleets
@given(plans_with_outages(kinds=("open_loop", "trace")))
def test_nobody_is_scheduled_while_a_replica_is_down(plan: RunPlan) -> None:
    requests = Simulation(plan).run().requests
    for outage in plan.fleet.outages:
        here = requests["expert_index"] == outage.expert_index
        here &= requests["replica_index"] == outage.replica_index
        scheduled_s = requests["scheduled_s"][here]
        assert not ((scheduled_s > outage.at_s) & (scheduled_s < outage.at_s + outage.for_s)).any()
        ended_s = requests["last_token_engine_s"][here & (requests["status"] == COMPLETED)]
        assert not ((ended_s > outage.at_s) & (ended_s < outage.at_s + outage.for_s)).any()


@random_fleets
@given(plans())
def test_an_outage_after_the_end_changes_nothing(plan: RunPlan) -> None:
    if plan.fleet.router is None:
        return
    late = Outage(expert_index=0, replica_index=0, at_s=1e6, for_s=1.0)
    one = Simulation(plan).run()
    other = Simulation(replace(plan, fleet=replace(plan.fleet, outages=(late,)))).run()
    for name, column in one.requests.items():
        np.testing.assert_array_equal(column, other.requests[name], err_msg=name)


@random_fleets
@given(plans_with_outages(token_work_of_router=False))
def test_replicas_die_alike_with_and_without_fast_forward(plan: RunPlan) -> None:
    fast, slow = Simulation(plan).run().requests, Simulation(replace(plan, step_by_step=True)).run().requests
    np.testing.assert_array_equal(fast["status"], slow["status"])
    np.testing.assert_array_equal(fast["http_status"], slow["http_status"])
    ended = fast["status"] != IN_FLIGHT
    np.testing.assert_allclose(fast["last_token_s"][ended], slow["last_token_s"][ended], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- by hand


def fates(record: RunRecord) -> Counter[tuple[int, int]]:
    """How many requests have which (status, HTTP status)."""
    columns = record.requests["status"].tolist(), record.requests["http_status"].tolist()
    return Counter(zip(*columns, strict=True))


def by_request(record: RunRecord, name: str) -> NDArray[Any]:
    return np.asarray(record.requests[name][np.argsort(record.requests["request_id"])])


def steady(replicas: int, *outages: tuple[int, float, float], **changes: Any) -> RunPlan:
    """Ten requests a second, each with ten tokens in iterations of 0.1 s, evenly over the replicas."""
    plan = make_plan(
        make_expert(AffineCurve(fixed_s=0.1), replicas=replicas, engine=SYNCHRONOUS),
        OpenLoop(rate_rps=10, burstiness=1e6),
        at=10.0,
        router=FREE_ROUTER.model_copy(update={"replica_policy": "round_robin"}),
        classes={"class": ClassSpec(prompt_tokens=Fixed(value=1), output_tokens=Fixed(value=10))},
        run=RunSpec(duration_s=20.0, warm_up_s=0.0),
    )
    down = tuple(Outage(expert_index=0, replica_index=r, at_s=at_s, for_s=for_s) for r, at_s, for_s in outages)
    return replace(plan, fleet=replace(plan.fleet, outages=down, **changes))


def test_answers_that_have_begun_fail_when_their_replica_dies_and_no_others_do() -> None:
    record = Simulation(steady(2, (0, 5.03, 3.0))).run()
    requests = record.requests
    failed = requests["status"] == FAILED
    assert set(requests["http_status"][failed]) == {200}
    assert 3 <= failed.sum() <= 6  # five a second go there, each for a second
    np.testing.assert_allclose(requests["last_token_s"][failed], 5.03)
    assert set(requests["replica_index"][failed]) == {0}
    assert any("tried once more" in note for note in record.notes)


def test_a_replica_is_back_after_two_good_checks_and_a_trial_and_then_gets_its_share() -> None:
    record = Simulation(steady(2, (0, 5.03, 3.0))).run()
    sent_s, replica = by_request(record, "sent_s"), by_request(record, "replica_index")
    down = (sent_s > 5.1) & (sent_s < 9.9)  # checks at 9 and 10 s find it up
    assert set(replica[down]) == {1}
    first_s = sent_s[(replica == 0) & (sent_s > 5.1)].min()
    assert 10.0 <= first_s <= 10.2
    later = (sent_s > 12.0) & (sent_s < 18.0)
    assert np.mean(replica[later] == 0) == pytest.approx(0.5, abs=0.02)


def test_without_another_replica_requests_are_refused_until_it_is_back() -> None:
    record = Simulation(steady(1, (0, 5.03, 3.0))).run()
    found = fates(record)
    assert found[FAILED, 200] >= 8
    assert found[FAILED, 502] <= 2  # the one that waited for its first token
    sent_s, http = by_request(record, "sent_s"), by_request(record, "http_status")
    refused = http == 503
    assert refused.sum() == pytest.approx(10 * (10.0 - 5.03), abs=2)
    assert (sent_s[refused] > 5.03).all()
    assert (sent_s[refused] < 10.0).all()


def test_second_tries_have_a_budget() -> None:
    slow = make_expert(AffineCurve(fixed_s=10.0), replicas=2, engine=SYNCHRONOUS)
    load = OpenLoop(rate_rps=50, burstiness=1e6)
    router = FREE_ROUTER.model_copy(update={"replica_policy": "round_robin"})
    plan = make_plan(slow, load, at=50.0, router=router, run=RunSpec(duration_s=9.0, warm_up_s=0.0))
    outage = (Outage(expert_index=0, replica_index=0, at_s=4.01, for_s=inf),)
    for share, at_most in ((0.0, 0), (0.1, 20), (1.0, 100)):
        fleet = replace(plan.fleet, outages=outage, limits=LimitSpec(retry_share=share))
        record = Simulation(replace(plan, fleet=fleet)).run()
        found = fates(record)
        assert record.router is not None
        assert record.router.second_tries == pytest.approx(at_most, abs=1)
        assert found[FAILED, 502] == pytest.approx(100 - at_most, abs=2)


def test_users_of_a_dead_fleet_try_again_every_second() -> None:
    plan = make_plan(
        make_expert(AffineCurve(fixed_s=0.01), engine=SYNCHRONOUS),
        ClosedLoop(users=7),
        at=7,
        router=FREE_ROUTER,
        run=RunSpec(duration_s=20.0, warm_up_s=0.0),
    )
    outages = (Outage(expert_index=0, replica_index=0, at_s=10.0, for_s=inf),)
    requests = Simulation(replace(plan, fleet=replace(plan.fleet, outages=outages))).run().requests
    late = requests["sent_s"] > 12.0
    assert set(requests["http_status"][late & (requests["status"] == FAILED)]) == {503}
    assert late.sum() == pytest.approx(7 * 8, abs=8)


# --------------------------------------------------------------------------------------------------------- the file

FILE = """
workload:
  classes: {chat: {prompt_tokens: 100, output_tokens: 50}}
  load: {kind: closed_loop, users: 20}
fleets:
  whole: &whole
    router: {}
    experts: {chat: {model: llama-3.1-8b, gpu: H100-SXM, replicas: 2}}
  hurt:
    extends: whole
    outages: [{expert: chat, replica: 1, at_s: 1, for_s: 2}]
run: {requests: 200, replications: 1}
"""


def test_a_fleet_file_tells_outages_and_the_report_what_they_do() -> None:
    result = simulate(parse_fleet(FILE))
    rows = {row["fleet"]: row for row in result.summary_rows if row["expert"] == "all"}
    assert rows["whole"]["failed"] == 0
    assert rows["hurt"]["failed"] > 0
    assert rows["hurt"]["sent"] == sum(rows["hurt"][name] for name in ("completed", "failed", "in_flight"))
    assert any("whose answer broke off" in note for note in result.notes)


@pytest.mark.parametrize(
    ("outages", "mistake"),
    [
        ("[{expert: chta, at_s: 1}]", "did you mean 'chat'?"),
        ("[{expert: chat, replica: 2, at_s: 1}]", "chat has replicas 0 to 1, got 2"),
        ("[{expert: chat, at_s: 1, for_s: 5}, {expert: chat, at_s: 3}]", "chat/0 is still down then"),
        ("[{expert: chat, at_s: 1}, {expert: chat, at_s: 300}]", "chat/0 is still down then"),
        ("[{expert: chat, at_s: 1, for_s: 0}]", "for_s: must be > 0"),
        ("[{expert: chat}]", "at_s: missing"),
    ],
)
def test_a_mistake_in_an_outage_is_one_line(outages: str, mistake: str) -> None:
    text = FILE.replace("[{expert: chat, replica: 1, at_s: 1, for_s: 2}]", outages)
    with pytest.raises(FleetFileError) as raised:
        simulate(parse_fleet(text))
    (line,) = raised.value.mistakes
    assert mistake in line
    assert "fleets.hurt.outages[" in line


def test_outages_need_a_router() -> None:
    text = FILE.replace("    router: {}\n", "").replace(", replicas: 2", "").replace("replica: 1", "replica: 0")
    with pytest.raises(FleetFileError, match="no meaning without a router"):
        simulate(parse_fleet(text))
