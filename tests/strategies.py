"""Random small fleets under random traffic, for Hypothesis.

Whatever holds for every fleet should hold for these: pools so small that requests preempt each other, budgets from one
token a request to whole prompts, every policy, misrouted and refused prompts.
"""

from dataclasses import replace
from math import ceil, nan
from typing import get_args

import numpy as np
from hypothesis import strategies as st

from sim.fleet import EngineSettings, FrontEnd
from sim.simulation import RunPlan
from sim.spec import (
    ClassSpec,
    ClosedLoop,
    Distribution,
    Exponential,
    Fixed,
    Load,
    Lognormal,
    OpenLoop,
    Policy,
    ReplicaPolicy,
    RouterSpec,
    RunSpec,
    Trace,
    Uniform,
)
from sim.traffic import TraceTable, WorkloadData
from tests.fleets import FREE, AffineCurve, make_expert, make_plan

LOAD_KINDS = ("closed_loop", "open_loop", "trace")


def times_s(least: float, most: float) -> st.SearchStrategy[float]:
    """Times that are no round multiples of each other, so that different causes do not fall on one moment by chance."""
    return st.integers(1, 999).map(lambda i: float(least * (most / least) ** (i / 1000)))


def maybe_times_s(least: float, most: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | times_s(least, most)


@st.composite
def engines(draw: st.DrawFn) -> EngineSettings:
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_model_len = draw(st.integers(60, 160))
    max_num_seqs = draw(st.integers(1, 16))
    return EngineSettings(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.sampled_from([0, 1, 7, 40, 1000])),
        max_model_len=max_model_len,
        block_size=block_size,
        num_kv_blocks=ceil(max_model_len / block_size) + draw(st.integers(0, max_model_len // block_size)),
        enable_prefix_caching=draw(st.booleans()),
        scheduler_reserve_full_isl=draw(st.booleans()),
        async_scheduling=draw(st.booleans()),
    )


@st.composite
def curves(draw: st.DrawFn, *, kv_slope: bool = True) -> AffineCurve:
    curve = AffineCurve(
        fixed_s=draw(times_s(1e-3, 1e-1)),
        per_request_s=draw(maybe_times_s(1e-5, 1e-2)),
        per_prefill_token_s=draw(maybe_times_s(1e-5, 1e-3)),
    )
    if kv_slope and draw(st.booleans()):
        curve = replace(curve, per_kv_token_s=draw(times_s(1e-6, 1e-3)))
        if draw(st.booleans()):
            curve = replace(
                curve, knee_kv_tokens=draw(st.integers(5, 300)), per_kv_token_beyond_s=draw(times_s(1e-6, 1e-3))
            )
    return curve


@st.composite
def front_ends(draw: st.DrawFn, *, maybe_free: bool = True) -> FrontEnd:
    if maybe_free and draw(st.booleans()):
        return FREE
    return FrontEnd(
        # Not zero, or all who wait behind streamed tokens would reach the engine at one moment.
        per_request_s=draw(times_s(1e-4, 1e-1)),
        per_prompt_token_s=draw(maybe_times_s(1e-6, 1e-3)),
        per_output_token_s=draw(maybe_times_s(1e-5, 1e-1)),
        delay_s=draw(maybe_times_s(1e-4, 1e-1)),
        per_request_engine_s=draw(maybe_times_s(1e-4, 1e-1)),
    )


@st.composite
def routers(draw: st.DrawFn, classes: int, *, token_work: bool = True) -> RouterSpec:
    router = RouterSpec(
        policy=draw(st.sampled_from(get_args(Policy))),
        replica_policy=draw(st.sampled_from(get_args(ReplicaPolicy))),
        workers=draw(st.integers(1, 3)),
        per_request_s=draw(times_s(1e-4, 1e-1)),  # not zero: see front_ends
        per_prompt_token_s=draw(maybe_times_s(1e-6, 1e-3)),
        per_output_token_s=draw(maybe_times_s(1e-5, 1e-2)) if token_work else 0.0,
        per_wake_up_s=draw(maybe_times_s(1e-5, 1e-2)) if token_work else 0.0,
        service_cv=draw(st.sampled_from([0.0, 0.5, 1.0])),
        user_network_s=draw(maybe_times_s(1e-3, 1e-1)),
        expert_network_s=draw(maybe_times_s(1e-3, 1e-1)),
        accuracy=draw(st.sampled_from([1.0, 0.7])),
        spill_over_outstanding=draw(st.none() | st.integers(1, 4)),
    )
    if classes > 1 and draw(st.booleans()):
        router = router.model_copy(update={"confusion": {"class-0": {"class-0": 1.0, "class-1": 1.0}}})
    return router


@st.composite
def token_counts(draw: st.DrawFn, most: int) -> Distribution:
    match draw(st.sampled_from(["fixed", "uniform", "lognormal"])):
        case "fixed":
            return Fixed(value=draw(st.integers(1, most)))
        case "uniform":
            return Uniform(min=1, max=draw(st.integers(1, most)))
        case _:
            return Lognormal(mean=draw(st.integers(1, most)), cv=draw(st.sampled_from([0.3, 1.5])), max=most)


@st.composite
def think_times(draw: st.DrawFn) -> Distribution:
    mean_s = draw(times_s(1e-2, 1e1))
    distributions: list[Distribution] = [
        Exponential(mean=mean_s),
        Uniform(min=0, max=2 * mean_s),
        Lognormal(mean=mean_s, cv=1.0),
    ]
    return draw(st.sampled_from(distributions))


@st.composite
def loads(draw: st.DrawFn, kind: str, seed: int) -> tuple[Load, float, WorkloadData]:
    match kind:
        case "closed_loop":
            users = draw(st.integers(1, 40))
            load = ClosedLoop(users=users, think_time_s=draw(think_times()), ramp_up_s=draw(times_s(1e-1, 1e1)))
            return load, float(users), WorkloadData()
        case "open_loop":
            rate_rps = 1 / draw(times_s(3e-2, 3e0))
            return (
                OpenLoop(rate_rps=rate_rps, burstiness=draw(st.sampled_from([0.3, 1.0, 4.0]))),
                rate_rps,
                WorkloadData(),
            )
        case _:
            count = draw(st.integers(1, 60))
            rng = np.random.default_rng(seed)
            table = TraceTable(
                arrival_s=np.cumsum(rng.exponential(draw(times_s(1e-3, 1e0)), count)),
                prompt_tokens=rng.integers(1, draw(st.integers(2, 70)), count),
                output_tokens=rng.integers(1, draw(st.integers(2, 70)), count),
            )
            return Trace(file="trace.csv", format="azure"), nan, WorkloadData(trace=table)


@st.composite
def plans(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = LOAD_KINDS,
    policies: tuple[str, ...] = get_args(Policy),
    kv_slope: bool = True,
    token_work_of_router: bool = True,
    free_front_ends: bool = True,
) -> RunPlan:
    """Plans of some tens of requests on 1 to 3 experts of 1 to 3 replicas.

    Args:
        draw: given by Hypothesis.
        kinds: of load.
        policies: of the router.
        kv_slope: whether some curves grow with the KV read.
        token_work_of_router: whether some routers spend time on streamed tokens.
        free_front_ends: whether some take no time. Behind a router that is late with tokens, a request may then reach
            the engine in the very moment in which an iteration ends, and rounding decides which of the two is first.
    """
    seed = draw(st.integers(0, 2**32 - 1))
    classes = draw(st.integers(1, 3))
    experts = tuple(
        make_expert(
            draw(curves(kv_slope=kv_slope)),
            name=f"expert-{index}",
            engine=draw(engines()),
            front_end=draw(front_ends(maybe_free=free_front_ends)),
            replicas=draw(st.integers(1, 3)),
        )
        for index in range(draw(st.integers(1, 3)))
    )
    lone = len(experts) == experts[0].replicas == 1
    router = None
    if not lone or draw(st.booleans()):
        router = draw(routers(classes, token_work=token_work_of_router))
        router = router.model_copy(update={"policy": draw(st.sampled_from(policies))})
    load, at, data = draw(loads(draw(st.sampled_from(kinds)), seed))
    return make_plan(
        experts,
        load,
        at=at,
        router=router,
        classes={
            f"class-{index}": ClassSpec(
                share=draw(st.sampled_from([1.0, 3.0])),
                prompt_tokens=draw(token_counts(70)),
                output_tokens=draw(token_counts(70)),
                shared_prefix_tokens=draw(st.sampled_from([0, 0, 5, 16, 40])),
            )
            for index in range(classes)
        },
        class_map=tuple(
            tuple(draw(st.permutations(range(len(experts))))[: draw(st.integers(1, len(experts)))])
            for _ in range(classes)
        ),
        run=RunSpec(requests=draw(st.integers(1, 60)), warm_up_requests=draw(st.sampled_from([0, 10])), seed=seed),
        data=data,
    )
