"""Jumping over iterations in closed form gives the same records as simulating every one of them."""

from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from sim.fleet import EngineSettings, FrontEnd
from sim.records import IN_FLIGHT, RunRecord
from sim.simulation import RunPlan, Simulation
from sim.spec import RouterSpec, RunSpec, Trace
from sim.traffic import TraceTable, WorkloadData
from tests.fleets import FREE, FREE_ROUTER, ROOMY, AffineCurve, make_expert, make_plan
from tests.strategies import plans

ROUNDING_S = 1e-9


def happened(record: RunRecord, name: str) -> NDArray[Any]:
    """A column, without what requests in flight reached at the very end: rounding decides whether before or after."""
    column = record.requests[name].copy()
    if name.endswith("_s"):
        at_the_end = column > record.window_s[1] - ROUNDING_S
        column[at_the_end & (record.requests["status"] == IN_FLIGHT)] = nan
    return column


def assert_same_records(plan: RunPlan) -> RunRecord:
    fast = Simulation(plan).run()
    slow = Simulation(replace(plan, step_by_step=True)).run()
    for name in fast.requests:
        np.testing.assert_allclose(
            happened(fast, name), happened(slow, name), rtol=1e-9, atol=ROUNDING_S, equal_nan=True, err_msg=name
        )
    assert fast.gaps.weight.sum() == slow.gaps.weight.sum()
    # A congested router's delay is foreseen, and can shrink faster than tokens come; such gaps count as 0, which the
    # two ways do at different points. Everywhere else gaps agree.
    clipped = any((record.gaps.gap_s <= 0).any() for record in (fast, slow))
    for expert_index in range(0 if clipped else len(plan.fleet.experts)):
        # Gaps are rounded to the microsecond, so their means agree to one.
        assert mean_gap_s(fast, expert_index) == pytest.approx(mean_gap_s(slow, expert_index), abs=1e-6, nan_ok=True)
    return fast


def mean_gap_s(record: RunRecord, expert_index: int) -> float:
    of_expert = record.gaps.expert_index == expert_index
    weight = record.gaps.weight[of_expert]
    return float(record.gaps.gap_s[of_expert] @ weight / weight.sum()) if weight.any() else nan


random_fleets = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@random_fleets
@given(plans(token_work_of_router=False))
def test_fast_forward_changes_no_record_of_any_fleet(plan: RunPlan) -> None:
    assert_same_records(plan)


@random_fleets
@given(plans(kv_slope=False, free_front_ends=False))
def test_fast_forward_changes_no_record_where_streamed_tokens_occupy_the_router(plan: RunPlan) -> None:
    assert_same_records(plan)


# --------------------------------------------------------------------------------------------------- deep cases


def replay(
    requests: list[tuple[float, int, int]],
    curve: AffineCurve,
    *,
    engine: EngineSettings = ROOMY,
    front_end: FrontEnd = FREE,
    router: RouterSpec | None = None,
) -> RunPlan:
    """One replica under these (arrival, prompt tokens, output tokens)."""
    arrival_s, prompt_tokens, output_tokens = zip(*requests, strict=True)
    table = TraceTable(
        arrival_s=np.array(arrival_s, np.float64),
        prompt_tokens=np.array(prompt_tokens, np.int64),
        output_tokens=np.array(output_tokens, np.int64),
    )
    return make_plan(
        make_expert(curve, engine=engine, front_end=front_end),
        Trace(file="trace.csv", format="azure"),
        at=nan,
        router=router,
        run=RunSpec(),
        data=WorkloadData(trace=table),
    )


def test_a_long_answer_to_one_user_is_the_sum_of_its_iterations() -> None:
    curve = AffineCurve(fixed_s=0.01, per_kv_token_s=1e-6)
    record = assert_same_records(replay([(0.0, 1000, 20_000)], curve))
    # The prompt's iteration reads no KV of decodes; the k-th decode reads the prompt and k tokens.
    expected_s = 0.01 + sum(0.01 + 1e-6 * (1000 + k) for k in range(1, 20_000))
    assert record.requests["last_token_s"][0] == pytest.approx(expected_s)


def test_a_run_stops_at_the_knee_of_the_curve() -> None:
    curve = AffineCurve(fixed_s=0.01, per_kv_token_s=1e-6, knee_kv_tokens=1500, per_kv_token_beyond_s=1e-4)
    record = assert_same_records(replay([(0.0, 1000, 1000), (0.333, 7, 2000)], curve))
    alone = Simulation(replay([(0.0, 1000, 1000)], curve)).run()
    kv_tokens = 1000 + np.arange(1, 1000)
    seconds = 0.01 + 1e-6 * np.minimum(kv_tokens, 1500) + 1e-4 * np.maximum(kv_tokens - 1500, 0)
    assert alone.requests["last_token_s"][0] == pytest.approx(0.01 + seconds.sum())
    assert record.requests["last_token_s"][0] > alone.requests["last_token_s"][0]


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_requests_that_outgrow_the_pool_preempt_each_other_alike(
    async_scheduling: bool, enable_prefix_caching: bool
) -> None:
    engine = replace(
        ROOMY,
        num_kv_blocks=40,
        max_model_len=600,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        async_scheduling=async_scheduling,
        enable_prefix_caching=enable_prefix_caching,
    )
    curve = AffineCurve(fixed_s=0.01, per_request_s=1e-3, per_prefill_token_s=1e-4, per_kv_token_s=1e-6)
    requests = [(0.0137 * i, 60 + 13 * i, 150 + 7 * i) for i in range(20)]
    record = assert_same_records(replay(requests, curve, engine=engine))
    assert record.requests["preemptions"].sum() > 20


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("iteration", [0, 1, 48, 97, 98, 99, 100])
@pytest.mark.parametrize("within", [0.01, 0.5, 0.99])
def test_an_arrival_in_any_iteration_of_a_run_is_admitted_alike(
    async_scheduling: bool, iteration: int, within: float
) -> None:
    # One answer of 100 tokens takes iterations 0 to 99; the other prompt comes in one of them, or right after.
    engine = replace(ROOMY, async_scheduling=async_scheduling)
    record = assert_same_records(
        replay([(0.0, 10, 100), (0.01 * (iteration + within), 10, 5)], AffineCurve(fixed_s=0.01), engine=engine)
    )
    second = int(np.argmax(record.requests["request_id"] == 1))
    scheduled_s = record.requests["scheduled_s"][second]
    # At the end of the iteration it comes in; with asynchronous scheduling the next one is decided already, if there
    # is one. An idle engine takes it up at once.
    taken_up_at = min(iteration + 1 + async_scheduling, 100) if iteration < 100 else iteration + within
    assert scheduled_s == pytest.approx(0.01 * taken_up_at)


def test_a_request_takes_its_front_ends_work_from_a_busy_engine_alone() -> None:
    def ends_s(second_sent_s: float) -> list[float]:
        plan = replay(
            [(0.0, 10, 20), (second_sent_s, 10, 5)],
            AffineCurve(fixed_s=0.01),
            engine=replace(ROOMY, async_scheduling=False),
            front_end=replace(FREE, per_request_engine_s=0.004),
        )
        requests = assert_same_records(plan).requests
        return list(requests["last_token_s"][np.argsort(requests["request_id"])])

    assert ends_s(0.055) == pytest.approx([20 * 0.01 + 0.004, 0.06 + 5 * 0.01 + 0.004])
    assert ends_s(1.0) == pytest.approx([20 * 0.01, 1.0 + 5 * 0.01])


def test_a_burst_behind_a_slow_front_end_is_admitted_alike() -> None:
    front_end = FrontEnd(
        per_request_s=0.0173, per_prompt_token_s=1e-5, per_output_token_s=0.0031, per_request_engine_s=0.0037
    )
    requests = [(0.0011 * i, 10 + i, 40 + 3 * i) for i in range(30)]
    assert_same_records(replay(requests, AffineCurve(fixed_s=0.0101, per_kv_token_s=1e-6), front_end=front_end))


# ------------------------------------------------------------------------------------- streamed tokens in the router


@pytest.mark.parametrize("step_by_step", [False, True])
@pytest.mark.parametrize("per_kv_token_s", [0.0, 1e-4])
@pytest.mark.parametrize(
    "requests",
    [
        pytest.param([(0.0, 1, 1000), (0.2, 1, 100)], id="a run cut short"),
        pytest.param([(0.0, 1, 5), (0.0, 100, 1)], id="iterations without tokens"),
    ],
)
def test_the_router_spends_its_time_on_every_streamed_token_once(
    requests: list[tuple[float, int, int]], per_kv_token_s: float, step_by_step: bool
) -> None:
    router = FREE_ROUTER.model_copy(update={"per_output_token_s": 1e-3})
    curve = AffineCurve(fixed_s=0.01, per_kv_token_s=per_kv_token_s)
    engine = replace(ROOMY, max_num_batched_tokens=4, max_num_seqs=4)
    plan = replace(replay(requests, curve, engine=engine, router=router), step_by_step=step_by_step)
    record = Simulation(plan).run()
    assert record.router is not None
    busy_s = record.router.utilization * (record.window_s[1] - record.window_s[0])
    assert busy_s == pytest.approx(1e-3 * sum(output_tokens for _, _, output_tokens in requests))


def test_tokens_leave_front_end_and_router_in_order_while_both_backlogs_shrink() -> None:
    # A's first token is made at 2.6 s, behind 1.5 s of work in the front end (three more prompts) and 1.4 s in the
    # router (prompts the engine refuses); its last one at 4.1 s, when both have just run dry. So the first one reaches
    # the router at 4.1 s and finds it idle as well.
    router = FREE_ROUTER.model_copy(update={"per_request_s": 0.1, "per_output_token_s": 1e-6})
    answered = [(0.0, 1, 2), (0.1, 1, 1), (0.1, 1, 1), (0.1, 1, 1)]
    refused = [(2.5, ROOMY.max_model_len, 1)] * 15
    record = Simulation(
        replay(
            [*answered, *refused],
            AffineCurve(fixed_s=1.5),
            engine=replace(ROOMY, async_scheduling=False),
            front_end=replace(FREE, per_request_s=1.0, per_output_token_s=1e-6),
            router=router,
        )
    ).run()
    row = int(np.argmax(record.requests["request_id"] == 0))
    assert record.requests["first_token_s"][row] <= record.requests["last_token_s"][row]
