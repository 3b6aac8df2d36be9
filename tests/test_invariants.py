"""What holds for every fleet under every traffic: nothing is lost, time runs forward, nobody sees the future."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import isnan
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sim import parse_fleet, simulate
from sim.fleet import Fleet, FrontEnd
from sim.kv_cache import KvCache
from sim.records import COMPLETED, FAILED, IN_FLIGHT, RunRecord
from sim.service_curve import IterationWork
from sim.simulation import RunPlan, Simulation
from sim.spec import (
    ClassSpec,
    ClosedLoop,
    Distribution,
    Exponential,
    Load,
    Lognormal,
    OpenLoop,
    Policy,
    ReplicaPolicy,
    RunSpec,
    Trace,
    Uniform,
)
from sim.traffic import WorkloadData
from tests.fleets import FREE_ROUTER, ROOMY, AffineCurve, make_expert, make_plan
from tests.strategies import plans

ROUNDING_S = 1e-9
GAP_RESOLUTION_S = 1e-6

random_fleets = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
traces = plans(kinds=("trace",)).map(lambda plan: replace(plan, run=RunSpec(seed=plan.run.seed)))  # replayed whole


def run(plan: RunPlan) -> RunRecord:
    return Simulation(plan).run()


def by_request(record: RunRecord) -> dict[str, NDArray[Any]]:
    """The columns, in the order in which the requests were made."""
    order = np.argsort(record.requests["request_id"])
    return {name: column[order] for name, column in record.requests.items()}


def assert_equal_columns(one: RunRecord, other: RunRecord, *, but: tuple[str, ...] = ()) -> None:
    assert list(one.requests) == list(other.requests)
    for name, column in one.requests.items():
        if name not in but:
            np.testing.assert_array_equal(column, other.requests[name], err_msg=name)


# ----------------------------------------------------------------------------------------------------- conservation


@random_fleets
@given(plans())
def test_every_request_sent_has_one_outcome(plan: RunPlan) -> None:
    simulation = Simulation(plan)
    requests = by_request(simulation.run())
    ids, status = requests["request_id"], requests["status"]
    assert len(np.unique(ids)) == len(ids)
    ended = np.count_nonzero((status == COMPLETED) | (status == FAILED))
    assert ended == simulation.counted.ended
    assert ended + np.count_nonzero(status == IN_FLIGHT) == len(ids)
    assert not np.isnan(requests["last_token_s"][status != IN_FLIGHT]).any()
    assert np.isnan(requests["first_token_engine_s"][status == FAILED]).all()
    if isinstance(plan.workload.load, ClosedLoop):  # a user sends again when the answer has come, and not before
        for user in range(int(plan.load)):
            own = {name: column[requests["user_id"] == user] for name, column in requests.items()}
            assert np.count_nonzero(own["status"] == IN_FLIGHT) <= 1
            assert (own["sent_s"][1:] >= own["last_token_s"][:-1] - ROUNDING_S).all()
    else:  # numbered as they come, and none left out
        np.testing.assert_array_equal(ids, np.arange(len(ids)))


@random_fleets
@given(traces)
def test_a_trace_replayed_whole_leaves_nothing_behind(plan: RunPlan) -> None:
    assert plan.data.trace is not None
    simulation = Simulation(plan)
    record = simulation.run()
    requests = by_request(record)
    assert (requests["status"] != IN_FLIGHT).all()
    np.testing.assert_array_equal(requests["sent_s"], plan.data.trace.arrival_s)
    np.testing.assert_array_equal(requests["prompt_tokens"], plan.data.trace.prompt_tokens)
    np.testing.assert_array_equal(requests["output_tokens"], plan.data.trace.output_tokens)
    for replica in simulation.replicas:
        engine = replica.engine
        assert engine.kv.free == engine.kv.num_blocks
        assert (len(engine.running), engine.queued, replica.outstanding) == (0, 0, 0)
    completed = requests["status"] == COMPLETED
    for index, expert in enumerate(plan.fleet.experts):  # refused are those too long for their expert, and only they
        here = requests["expert_index"] == index
        fits = requests["prompt_tokens"] + requests["output_tokens"] <= expert.engine.max_model_len
        np.testing.assert_array_equal(completed[here], fits[here])


@contextmanager
def watched_pools() -> Iterator[list[int]]:
    """Collect how many blocks are free after every change of any pool."""
    seen: list[int] = []

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def changed(cache: KvCache, *args: Any) -> None:
            change(cache, *args)
            seen.append(cache.free)
            assert 0 <= cache.free <= cache.num_blocks

        return changed

    with pytest.MonkeyPatch.context() as patch:
        for name in ("take", "give_back", "give_back_shared", "hold_shared", "reclaim"):
            patch.setattr(KvCache, name, watched(getattr(KvCache, name)))
        yield seen


@random_fleets
@given(plans())
def test_a_pool_never_has_fewer_free_blocks_than_none_or_more_than_all(plan: RunPlan) -> None:
    with watched_pools() as seen:
        record = run(plan)
    assert seen or not (record.requests["status"] == COMPLETED).any()


def assert_gaps_are_the_tokens_after_the_first(record: RunRecord) -> None:
    """As many as there are tokens after first ones, and in all as long as they take.

    The backlog of a congested router is foreseen, which can come out too small; a gap counts as 0 then, not less.
    """
    requests, (start_s, end_s) = record.requests, record.window_s
    measured = requests["status"] == COMPLETED
    measured &= (requests["last_token_s"] > start_s) & (requests["last_token_s"] <= end_s)
    for index in range(len(record.expert_names)):
        here = measured & (requests["expert_index"] == index)
        of_expert = record.gaps.expert_index == index
        gap_s, weight = record.gaps.gap_s[of_expert], record.gaps.weight[of_expert]
        assert (gap_s >= 0).all()
        assert weight.sum() == (requests["output_tokens"][here] - 1).sum()
        streamed_s = (requests["last_token_s"] - requests["first_token_s"])[here].sum()
        rounding_s = GAP_RESOLUTION_S * (1 + weight.sum())
        assert gap_s @ weight >= streamed_s - rounding_s
        assert (gap_s == 0).any() or gap_s @ weight <= streamed_s + rounding_s


@random_fleets
@given(plans())
def test_every_token_after_the_first_is_one_gap(plan: RunPlan) -> None:
    assert_gaps_are_the_tokens_after_the_first(run(plan))


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("warm_up_requests", [0, 20])
def test_gaps_across_preemptions_last_as_long_as_their_user_waits(
    async_scheduling: bool, warm_up_requests: int
) -> None:
    engine = replace(
        ROOMY, num_kv_blocks=16, max_model_len=200, max_num_batched_tokens=64, async_scheduling=async_scheduling
    )
    front_end = FrontEnd(per_request_s=0.013, per_prompt_token_s=0.0, per_output_token_s=0.002)  # tokens queue in it
    record = run(
        make_plan(
            make_expert(AffineCurve(fixed_s=0.01, per_kv_token_s=1e-5), engine=engine, front_end=front_end),
            ClosedLoop(users=12),
            at=12,
            router=FREE_ROUTER.model_copy(update={"expert_network_s": 0.003, "user_network_s": 0.004}),
            classes={"class": ClassSpec(prompt_tokens=Uniform(min=1, max=60), output_tokens=Uniform(min=1, max=99))},
            run=RunSpec(requests=60, warm_up_requests=warm_up_requests),
        )
    )
    assert record.requests["preemptions"].sum() > 40
    assert_gaps_are_the_tokens_after_the_first(record)


# ------------------------------------------------------------------------------------------------------------ time

WAY = (
    "sent_s",
    "router_start_s",
    "router_end_s",
    "front_end_start_s",
    "engine_arrival_s",
    "scheduled_s",
    "first_token_engine_s",
    "last_token_engine_s",
    "last_token_s",
)


@random_fleets
@given(plans())
def test_timestamps_are_in_the_order_of_the_way_and_none_is_left_out(plan: RunPlan) -> None:
    requests = run(plan).requests
    way = [name for name in WAY if plan.fleet.router is not None or not name.startswith("router")]
    times_s = np.array([requests[name] for name in way])
    for before_s, after_s in pairwise(times_s):
        assert not (after_s < before_s - ROUNDING_S).any()
    assert not (requests["first_token_s"] < requests["first_token_engine_s"] - ROUNDING_S).any()
    assert not (requests["last_token_s"] < requests["first_token_s"] - ROUNDING_S).any()
    completed, in_flight = requests["status"] == COMPLETED, requests["status"] == IN_FLIGHT
    assert not np.isnan(times_s[:, completed]).any()
    assert not np.isnan(requests["first_token_s"][completed]).any()
    # In flight: what is reached is reached in order, so after the first missing time all are.
    missing = np.isnan(times_s[:, in_flight])
    assert (missing[1:] >= missing[:-1]).all()
    one_token = completed & (requests["output_tokens"] == 1)
    np.testing.assert_array_equal(requests["first_token_s"][one_token], requests["last_token_s"][one_token])


@random_fleets
@given(plans())
def test_twice_the_seconds_everywhere_is_twice_the_time_of_everything(plan: RunPlan) -> None:
    # Doubling is exact in floating point, and so must this be.
    once, twice = run(plan).requests, run(slowed_down(plan)).requests
    for name, column in once.items():
        factor = 2 if name.endswith("_s") else 1
        np.testing.assert_array_equal(factor * column, twice[name], err_msg=name)


def slowed_down(plan: RunPlan) -> RunPlan:
    """The same plan with every second in it twice as long."""
    experts = tuple(
        replace(expert, curve=slow_curve(expert.curve), front_end=slow_front_end(expert.front_end))
        for expert in plan.fleet.experts
    )
    router = plan.fleet.router
    if router is not None:
        doubled = {name: 2 * value for name, value in router if name.endswith("_s")}
        router = router.model_copy(update=doubled)
    load, at = plan.workload.load, plan.load
    slow_load: Load
    match load:
        case ClosedLoop():
            slow_load = load.model_copy(
                update={"think_time_s": slow_think_time(load.think_time_s), "ramp_up_s": 2 * load.ramp_up_s}
            )
        case OpenLoop():
            slow_load, at = load, at / 2
        case Trace():
            slow_load = load.model_copy(update={"time_scale": 2.0})
    return replace(
        plan,
        fleet=replace(plan.fleet, router=router, experts=experts),
        workload=plan.workload.model_copy(update={"load": slow_load}),
        load=at,
    )


def slow_curve(curve: Any) -> AffineCurve:
    assert isinstance(curve, AffineCurve)
    return replace(curve, **{name: 2 * value for name, value in vars(curve).items() if name.endswith("_s")})


def slow_front_end(front_end: FrontEnd) -> FrontEnd:
    return FrontEnd(
        per_request_s=2 * front_end.per_request_s,
        per_prompt_token_s=2 * front_end.per_prompt_token_s,
        per_output_token_s=2 * front_end.per_output_token_s,
        delay_s=2 * front_end.delay_s,
        per_request_engine_s=2 * front_end.per_request_engine_s,
    )


def slow_think_time(think_time_s: Distribution) -> Distribution:
    match think_time_s:
        case Exponential() | Lognormal():
            return think_time_s.model_copy(update={"mean": 2 * think_time_s.mean})
        case Uniform():
            return Uniform(min=2 * think_time_s.min, max=2 * think_time_s.max)
        case _:
            raise AssertionError(f"no plan draws {think_time_s}")


# ----------------------------------------------------------------------------------------------------- same traffic


@random_fleets
@given(plans())
def test_the_same_seed_gives_the_same_bytes(plan: RunPlan) -> None:
    one, other = run(plan), run(plan)
    for name, column in one.requests.items():
        assert column.tobytes() == other.requests[name].tobytes(), name
    for name in ("expert_index", "gap_s", "weight"):
        assert getattr(one.gaps, name).tobytes() == getattr(other.gaps, name).tobytes(), name
    assert repr((one.replicas, one.router, one.notes, one.checks)) == repr(
        (other.replicas, other.router, other.notes, other.checks)
    )


TWO_FLEETS = """\
workload:
  classes:
    a: {prompt_tokens: 100, output_tokens: {distribution: uniform, min: 1, max: 40}}
    b: {prompt_tokens: {distribution: uniform, min: 1, max: 300}, output_tokens: 20}
  load: {kind: closed_loop, users: [1, 5], think_time_s: {distribution: exponential, mean: 0.1}}
fleets:
  one:
    experts: {only: {model: llama-3.1-8b, gpu: H100-SXM}}
  two:
    router: {policy: power_of_two_choices, service_cv: 1}
    experts:
      a: &expert {model: llama-3.1-8b, gpu: H100-SXM, replicas: 2}
      b: *expert
run: {requests: 30, seed: 3, replications: 2}
"""


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_processes() -> None:
    file = parse_fleet(TWO_FLEETS)
    alone, together = simulate(file, workers=1), simulate(file, workers=2)
    assert len(alone.runs) == len(together.runs) == 8
    for one, other in zip(alone.runs, together.runs, strict=True):
        assert (one.fleet, one.load, one.replication) == (other.fleet, other.load, other.replication)
        for name, column in one.requests.items():
            assert column.tobytes() == other.requests[name].tobytes(), name
        assert one.gaps.gap_s.tobytes() == other.gaps.gap_s.tobytes()
    assert repr(alone.summary_rows) == repr(together.summary_rows)
    assert len({run.requests["last_token_s"].tobytes() for run in alone.runs}) == 8  # each of them another run


def traffic(record: RunRecord) -> dict[tuple[int, int], tuple[int, int, int]]:
    """(user, its k-th request) -> class and lengths; where there are no users, all are one user's."""
    sent: dict[int, int] = {}
    found = {}
    requests = by_request(record)
    columns = (requests[name].tolist() for name in ("user_id", "class_index", "prompt_tokens", "output_tokens"))
    for user, class_index, prompt_tokens, output_tokens in zip(*columns, strict=True):
        k = sent[user] = sent.get(user, -1) + 1
        found[user, k] = class_index, prompt_tokens, output_tokens
    return found


@random_fleets
@given(plans(), st.sampled_from(get_args(Policy)), st.sampled_from(get_args(ReplicaPolicy)))
def test_different_policies_face_the_same_traffic(plan: RunPlan, policy: str, replica_policy: str) -> None:
    assume(plan.fleet.router is not None)
    one, other = run(plan), run(routed_by(plan, policy=policy, replica_policy=replica_policy))
    ours, theirs = traffic(one), traffic(other)
    both = ours.keys() & theirs.keys()
    assert both
    assert [ours[key] for key in both] == [theirs[key] for key in both]
    if not isinstance(plan.workload.load, ClosedLoop):  # at the same times, too
        sent_s = by_request(one)["sent_s"], by_request(other)["sent_s"]
        common = min(map(len, sent_s))
        np.testing.assert_array_equal(sent_s[0][:common], sent_s[1][:common])


def routed_by(plan: RunPlan, **changes: object) -> RunPlan:
    assert plan.fleet.router is not None
    return replace(plan, fleet=replace(plan.fleet, router=plan.fleet.router.model_copy(update=changes)))


# --------------------------------------------------------------------------------------------------------- capacity


@random_fleets
@given(plans())
def test_no_batch_exceeds_its_slots_or_its_token_budget(plan: RunPlan) -> None:
    expert = plan.fleet.experts[-1]
    simulation = Simulation(replace(plan, trace=(len(plan.fleet.experts) - 1, expert.replicas - 1)))
    simulation.run()
    end_s = 0.0
    for iteration in simulation.traced:
        assert iteration.decodes <= expert.engine.max_num_seqs
        assert iteration.prefill_tokens + iteration.decodes <= expert.engine.max_num_batched_tokens
        assert 0 <= iteration.kv_usage <= 1
        assert iteration.start_s >= end_s - ROUNDING_S  # one after the other
        end_s = iteration.start_s + iteration.duration_s
    for replica in simulation.replicas:
        assert (replica.runs()[:, 5] <= replica.expert.engine.max_num_seqs).all()


@random_fleets
@given(plans())
def test_no_engine_makes_tokens_faster_than_its_best_batch(plan: RunPlan) -> None:
    requests = run(plan).requests
    for expert_index, expert in enumerate(plan.fleet.experts):
        best = max(
            size / expert.curve.iteration_s(IterationWork(0, 0, 0, 0, size, 0))
            for size in range(1, expert.engine.max_num_seqs + 1)
        )
        for replica_index in range(expert.replicas):
            here = requests["status"] == COMPLETED
            here &= (requests["expert_index"] == expert_index) & (requests["replica_index"] == replica_index)
            if here.any():
                worked_s = requests["last_token_engine_s"][here].max() - requests["scheduled_s"][here].min()
                assert requests["output_tokens"][here].sum() <= best * worked_s * (1 + ROUNDING_S)


@random_fleets
@given(plans(kinds=("closed_loop",)), st.integers(1, 3))
def test_another_replica_changes_nothing_for_a_single_user(plan: RunPlan, more: int) -> None:
    assume(plan.fleet.router is not None)
    # Each replica has a prefix cache of its own, so shared prefixes would be hit less often.
    classes = {
        name: spec.model_copy(update={"shared_prefix_tokens": 0}) for name, spec in plan.workload.classes.items()
    }
    expert = plan.fleet.experts[0]

    def alone(replicas: int) -> RunRecord:
        fleet = replace(
            plan.fleet,
            experts=(replace(expert, replicas=replicas, gpus=replicas),),
            class_map=((0,),) * len(classes),
        )
        return run(replace(plan, fleet=fleet, workload=plan.workload.model_copy(update={"classes": classes}), load=1.0))

    few, many = alone(expert.replicas), alone(expert.replicas + more)
    assert len(few.requests["sent_s"]) > 1
    assert_equal_columns(few, many, but=("replica_index",))


# ---------------------------------------------------------------------------------------------------------- labels


@random_fleets
@given(plans(policies=("class", "class_with_spill_over")), st.randoms(use_true_random=False))
def test_another_order_of_experts_changes_nothing_but_their_numbers(plan: RunPlan, rng: Any) -> None:
    experts = plan.fleet.experts
    assume(len(experts) > 1)
    order = list(range(len(experts)))  # new number -> old number
    rng.shuffle(order)
    fleet = Fleet(
        name="relabelled",
        router=plan.fleet.router,
        experts=tuple(replace(experts[old], name=f"renamed-{old}") for old in order),
        class_map=tuple(tuple(order.index(old) for old in preferred) for preferred in plan.fleet.class_map),
    )
    before, after = run(plan), run(replace(plan, fleet=fleet))
    assert_equal_columns(before, after, but=("expert_index",))
    new = after.requests["expert_index"]
    old_number = np.where(new < 0, -1, np.array(order)[new])
    np.testing.assert_array_equal(before.requests["expert_index"], old_number)


@random_fleets
@given(plans(policies=("class", "class_with_spill_over")))
def test_a_prompt_goes_to_an_expert_of_the_class_it_was_taken_for(plan: RunPlan) -> None:
    assume(plan.fleet.router is not None)
    assert plan.fleet.router is not None
    requests = run(plan).requests
    chosen = requests["expert_index"] >= 0
    columns = (requests[name][chosen].tolist() for name in ("routed_class_index", "expert_index"))
    for taken_for, expert_index in zip(*columns, strict=True):
        experts = plan.fleet.class_map[taken_for]
        assert expert_index in (experts[:1] if plan.fleet.router.policy == "class" else experts)


# ------------------------------------------------------------------------------------------------------- no foresight


@settings(random_fleets, max_examples=150)
@given(plans(kinds=("trace",), kv_slope=False), st.integers(0, 59), st.integers(1, 70))
def test_no_decision_knows_how_long_an_answer_will_be(plan: RunPlan, changed: int, output_tokens: int) -> None:
    # Without kv_slope: the router's token rate is a mean over a run of iterations, and where these get longer it
    # depends a little on when the run ends.
    plan = replace(plan, run=RunSpec(seed=plan.run.seed))
    table = plan.data.trace
    assert table is not None
    assume(plan.fleet.router is not None)
    changed %= len(table.arrival_s)
    lengths = table.output_tokens.copy()
    assume(lengths[changed] != output_tokens)
    lengths[changed] = output_tokens
    one = by_request(run(plan))
    other = by_request(run(replace(plan, data=WorkloadData(trace=replace(table, output_tokens=lengths)))))
    # Nobody can tell before the shorter answer has ended, or the engine has refused the longer one.
    ends_s = (requests["last_token_engine_s"][changed] for requests in (one, other))
    told_s = min(one["router_end_s"][changed] if isnan(end_s) else end_s for end_s in ends_s)
    before = one["router_end_s"] < told_s - ROUNDING_S
    before[changed] = True
    for name in ("routed_class_index", "expert_index", "replica_index"):
        np.testing.assert_array_equal(one[name][before], other[name][before], err_msg=name)
