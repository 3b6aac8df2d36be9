"""With everything else turned off, each station is a textbook queue and behaves as the textbook says."""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import t as student

from sim.fleet import FrontEnd
from sim.records import COMPLETED, RunRecord
from sim.simulation import RunPlan, Simulation
from sim.spec import (
    ClassSpec,
    ClosedLoop,
    Distribution,
    Exponential,
    Fixed,
    OpenLoop,
    Quantity,
    RouterSpec,
    RunSpec,
    Uniform,
)
from sim.stations import FrontEndStation, RouterStation
from tests.fleets import FREE, FREE_ROUTER, ROOMY, AffineCurve, make_expert, make_plan
from tests.queueing_theory import (
    Station,
    closed_network,
    erlang_c_wait_s,
    md1_wait_s,
    mg1_ps_response_s,
    mg1_wait_s,
    mva,
)

INSTANT = AffineCurve(fixed_s=1e-9)
REPLICATIONS = 10
RUN = RunSpec(requests=4000, warm_up_requests=400)


def router(workers: int = 1, service_cv: float = 1.0, service_s: float = 1.0) -> RouterSpec:
    changes = {"workers": workers, "service_cv": service_cv, "per_request_s": service_s}
    return FREE_ROUTER.model_copy(update=changes)


def measured(record: RunRecord) -> NDArray[np.bool_]:
    requests, (start_s, end_s) = record.requests, record.window_s
    inside = (requests["last_token_s"] > start_s) & (requests["last_token_s"] <= end_s)
    return np.asarray(inside & (requests["status"] == COMPLETED))


def mean_between(enter: str, leave: str) -> Callable[[RunRecord], float]:
    def mean_s(record: RunRecord) -> float:
        return float((record.requests[leave] - record.requests[enter])[measured(record)].mean())

    return mean_s


router_wait_s = mean_between("sent_s", "router_start_s")
response_s = mean_between("sent_s", "last_token_s")


def throughput_rps(record: RunRecord) -> float:
    return float(measured(record).sum() / (record.window_s[1] - record.window_s[0]))


def replications(plan: RunPlan) -> list[RunRecord]:
    return [Simulation(replace(plan, replication=replication)).run() for replication in range(REPLICATIONS)]


def assert_mean_is(expected: float, samples: list[float], precision: float = 0.06) -> None:
    """Check independent samples against their theoretical mean, and that they are precise enough to tell."""
    error = float(np.std(samples, ddof=1)) / sqrt(len(samples))
    assert error < precision * expected, f"a standard error of {error:.3g} is too large to judge {expected:.3g} by"
    t = (np.mean(samples) - expected) / error
    limit = student.ppf(1 - 1e-3 / 2, len(samples) - 1)  # by chance one test in a thousand; the seeds are fixed
    assert abs(t) < limit, f"mean {np.mean(samples):.4g} is {t:.1f} standard errors from the theory's {expected:.4g}"


# ------------------------------------------------------------------------------------------------------ the router


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("utilization", [0.5, 0.75])
def test_the_router_alone_waits_as_erlang_c_says(workers: int, utilization: float) -> None:
    rate_rps = utilization * workers
    runs = replications(
        make_plan(make_expert(INSTANT), OpenLoop(rate_rps=rate_rps), at=rate_rps, router=router(workers), run=RUN)
    )
    assert_mean_is(erlang_c_wait_s(rate_rps, 1.0, workers), [router_wait_s(run) for run in runs])


@pytest.mark.parametrize("service_cv", [0.0, 0.5, 1.5])
def test_the_router_alone_waits_as_pollaczek_khinchine_say(service_cv: float) -> None:
    runs = replications(
        make_plan(make_expert(INSTANT), OpenLoop(rate_rps=0.7), at=0.7, router=router(1, service_cv), run=RUN)
    )
    assert_mean_is(mg1_wait_s(0.7, 1.0, service_cv), [router_wait_s(run) for run in runs])


def test_the_router_is_as_busy_as_its_load() -> None:
    runs = replications(make_plan(make_expert(INSTANT), OpenLoop(rate_rps=1.4), at=1.4, router=router(2), run=RUN))
    assert_mean_is(0.7, [run.router.utilization for run in runs if run.router is not None])


def test_the_router_takes_twice_the_prompt_tokens_for_twice_the_time() -> None:
    spec = FREE_ROUTER.model_copy(update={"per_prompt_token_s": 0.001})
    classes = {"class": ClassSpec(prompt_tokens=Uniform(min=1, max=1000), output_tokens=Fixed(value=1))}
    plan = make_plan(make_expert(INSTANT), OpenLoop(rate_rps=1.0), at=1.0, router=spec, classes=classes, run=RUN)
    service_s = 1001 / 2 * 0.001
    service_cv = sqrt((1000**2 - 1) / 12) / (1001 / 2)
    assert_mean_is(mg1_wait_s(1.0, service_s, service_cv), [router_wait_s(run) for run in replications(plan)])


def test_streamed_tokens_slow_the_router_down_to_the_rest_of_its_time() -> None:
    station = RouterStation(RouterSpec(per_request_s=1.0, per_prompt_token_s=0.0, per_output_token_s=0.01), lambda: 1.0)
    station.change_token_rate(0.0, 50)  # half of its time
    assert station.take_request(0.0, 1) == (0.0, 1.0)
    assert station.take_request(1.0, 1) == (1.5, 2.5)  # half a second of the first is still to do
    assert station.take_request(3.0, 1) == (3.5, 4.5)
    assert station.take_request(6.0, 1) == (6.0, 7.0)
    station.change_token_rate(6.0, -50)
    assert station.take_request(6.25, 1) == (7.0, 8.0)
    assert station.token_delay_s(6.5, 0.0, 1) == pytest.approx(1.5 + 0.01)
    assert station.token_delay_s(6.5, 1.0, 1) == pytest.approx(0.5 + 0.01)  # by then a second of it is done
    station.change_token_rate(8.0, 150)  # more than it can do
    assert station.take_request(12.0, 1) == pytest.approx((14.0, 15.0))


def test_the_router_with_a_constant_token_stream_is_a_slower_queue() -> None:
    # The work found by Poisson arrivals of an M/G/1 queue whose server works at rate 1 - u: Takács's formula
    # lambda E[S^2] / 2 over what is left of the server.
    token_load, rate_rps, service_cv2 = 0.4, 0.3, 1.0
    samples = []
    for seed in range(REPLICATIONS):
        rng = np.random.default_rng(seed)
        spec = RouterSpec(per_request_s=1.0, per_prompt_token_s=0.0, per_output_token_s=0.01)
        station = RouterStation(spec, rng.standard_exponential)
        station.change_token_rate(0.0, token_load / spec.per_output_token_s)
        arrivals_s = np.cumsum(rng.exponential(1 / rate_rps, 6000)).tolist()
        waits_s = [station.take_request(arrival_s, 1)[0] - arrival_s for arrival_s in arrivals_s]
        samples.append(float(np.mean(waits_s[1000:])))
    assert_mean_is(rate_rps * (1 + service_cv2) / 2 / (1 - token_load - rate_rps), samples)


# --------------------------------------------------------------------------------------------------- the front end


def test_the_front_end_alone_waits_as_a_queue_with_constant_service() -> None:
    expert = make_expert(INSTANT, front_end=replace(FREE, per_request_s=0.5))
    runs = replications(make_plan(expert, OpenLoop(rate_rps=1.5), at=1.5, run=RUN))
    assert_mean_is(md1_wait_s(1.5, 0.5), [mean_between("sent_s", "front_end_start_s")(run) for run in runs])


def test_the_delay_behind_the_front_end_keeps_nobody_else_waiting() -> None:
    front_end = replace(FREE, per_request_s=0.5, delay_s=3.0)
    runs = replications(make_plan(make_expert(INSTANT, front_end=front_end), OpenLoop(rate_rps=1.5), at=1.5, run=RUN))
    assert_mean_is(md1_wait_s(1.5, 0.5) + 3.5, [mean_between("sent_s", "engine_arrival_s")(run) for run in runs])


def lindley_delays_s(ends_s: NDArray[np.float64], work_s: float, backlog_s: float = 0.0) -> list[float]:
    """The delay of each iteration's tokens: what is left to do when they come, and they themselves."""
    delays_s = []
    before_s = 0.0
    for end_s in ends_s.tolist():
        backlog_s = max(0.0, backlog_s - (end_s - before_s)) + work_s
        before_s = end_s
        delays_s.append(backlog_s)
    return delays_s


@given(
    iterations=st.integers(1, 60),
    first_s=st.floats(1e-3, 1.0),
    growth_s=st.floats(0, 0.1),
    work_s=st.floats(0, 2.0),
    backlog_s=st.floats(0, 20.0),
)
def test_a_run_of_iterations_delays_its_last_tokens_as_lindley_says(
    iterations: int, first_s: float, growth_s: float, work_s: float, backlog_s: float
) -> None:
    ends_s = np.cumsum(first_s + growth_s * np.arange(iterations))
    station = FrontEndStation()
    station.take_request(0.0, backlog_s)
    delay_s = station.take_tokens(iterations, work_s, float(ends_s[0]), float(ends_s[-1]))
    assert delay_s == pytest.approx(lindley_delays_s(ends_s, work_s, backlog_s)[-1], abs=1e-9)


@pytest.mark.parametrize("per_kv_token_s", [0.0, 1e-4])
@pytest.mark.parametrize("per_output_token_s", [0.005, 0.02, 0.03])
def test_a_front_end_slower_than_the_engine_sets_the_pace_of_tokens(
    per_kv_token_s: float, per_output_token_s: float
) -> None:
    expert = make_expert(
        AffineCurve(fixed_s=0.01, per_kv_token_s=per_kv_token_s),
        front_end=FrontEnd(per_request_s=0.0, per_prompt_token_s=0.0, per_output_token_s=per_output_token_s),
    )
    classes = {"class": ClassSpec(prompt_tokens=Fixed(value=100), output_tokens=Fixed(value=300))}
    run = RunSpec(requests=1, warm_up_requests=0)
    requests = Simulation(make_plan(expert, ClosedLoop(users=1), at=1, classes=classes, run=run)).run().requests
    # The prompt reads no KV; the k-th decode reads 100 + k tokens.
    ends_s = np.cumsum([0.01, *(0.01 + per_kv_token_s * (100 + np.arange(1, 300)))])
    delays_s = lindley_delays_s(ends_s, per_output_token_s)
    assert requests["last_token_engine_s"][0] == pytest.approx(ends_s[-1])
    assert requests["first_token_s"][0] == pytest.approx(ends_s[0] + delays_s[0])
    assert requests["last_token_s"][0] == pytest.approx(ends_s[-1] + delays_s[-1])


# ------------------------------------------------------------------------------------------------------ the engine

TOKEN_S = 1e-3


def generation(output_tokens: Quantity) -> dict[str, ClassSpec]:
    return {"class": ClassSpec(prompt_tokens=Fixed(value=1), output_tokens=output_tokens)}


@pytest.mark.parametrize("output_tokens", [Fixed(value=1000), Exponential(mean=1000)], ids=["fixed", "exponential"])
def test_an_engine_that_shares_its_pace_responds_as_processor_sharing(output_tokens: Distribution) -> None:
    # An iteration takes its time per request, so each of k requests gets 1/k of the engine; one iteration in a
    # thousand makes the sharing as good as continuous.
    expert = make_expert(AffineCurve(per_request_s=TOKEN_S))
    classes = generation(output_tokens)
    run = RunSpec(requests=1500, warm_up_requests=150)
    runs = replications(make_plan(expert, OpenLoop(rate_rps=0.5), at=0.5, classes=classes, run=run))
    assert_mean_is(mg1_ps_response_s(0.5, 1000 * TOKEN_S), [response_s(run) for run in runs])


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_engine_of_one_slot_waits_as_pollaczek_khinchine_say(async_scheduling: bool) -> None:
    engine = replace(ROOMY, max_num_seqs=1, async_scheduling=async_scheduling)
    expert = make_expert(AffineCurve(fixed_s=TOKEN_S), engine=engine)
    classes = generation(Uniform(min=1, max=999))
    runs = replications(
        make_plan(
            expert, OpenLoop(rate_rps=1.2), at=1.2, classes=classes, run=RunSpec(requests=2000, warm_up_requests=200)
        )
    )
    service_cv = sqrt((999**2 - 1) / 12) / 500
    wait_s = mean_between("engine_arrival_s", "scheduled_s")
    assert_mean_is(mg1_wait_s(1.2, 500 * TOKEN_S, service_cv), [wait_s(run) for run in runs])


# ------------------------------------------------------------------------------------------------- closed networks


@pytest.mark.parametrize("think_time_s", [Exponential(mean=5.0), Fixed(value=5.0)], ids=["exponential", "fixed"])
def test_users_and_the_router_are_the_network_of_mean_value_analysis(think_time_s: Distribution) -> None:
    # Users who think are a delay, which is product form whatever its distribution.
    users = 8
    load = ClosedLoop(users=users, think_time_s=think_time_s, ramp_up_s=5.0)
    runs = replications(make_plan(make_expert(INSTANT), load, at=users, router=router(), run=RUN))
    theory = mva(users, 5.0, [1.0])
    assert_mean_is(theory.throughput_rps, [throughput_rps(run) for run in runs])
    assert_mean_is(theory.response_s, [response_s(run) for run in runs])


def test_users_a_router_of_two_workers_and_a_sharing_engine_are_a_product_form_network() -> None:
    users = 10
    load = ClosedLoop(users=users, think_time_s=Exponential(mean=2.0), ramp_up_s=2.0)
    expert = make_expert(AffineCurve(per_request_s=TOKEN_S))
    run = RunSpec(requests=2500, warm_up_requests=250)
    plan = make_plan(expert, load, at=users, router=router(2, 1.0, 0.5), classes=generation(Fixed(value=400)), run=run)
    runs = replications(plan)
    theory = closed_network(users, 2.0, [Station(0.5, 2), Station(400 * TOKEN_S)])
    assert_mean_is(theory.throughput_rps, [throughput_rps(run) for run in runs])
    assert_mean_is(theory.response_s, [response_s(run) for run in runs])
