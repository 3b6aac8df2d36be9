from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.metrics import replication_columns, run_metrics, weighted_distribution, weighted_percentiles
from sim.records import COMPLETED, FAILED, IN_FLIGHT, RouterStats, RunRecord
from sim.spec import SloSpec
from tests.run_records import REPLICA, make_fleet, make_gaps, make_requests


def small_run() -> RunRecord:
    """Two experts; of expert-0 two requests count, of expert-1 one; one failed, one is late, one still under way."""
    requests = make_requests(
        6,
        expert_index=[0, 0, 1, 1, 0, -1],
        class_index=[0, 0, 1, 1, 0, 0],
        routed_class_index=[0, 1, 1, 1, 0, 0],
        prompt_tokens=[100, 200, 300, 10, 10, 10],
        output_tokens=[11, 1, 21, 0, 5, 0],
        sent_s=[10, 11, 12, 13, 14, 15],
        router_start_s=[10.003, 11.001, 12.001, 13.001, 14.001, np.nan],
        router_end_s=[10.004, 11.002, 12.002, 13.002, 14.002, np.nan],
        front_end_start_s=[10.0045, 11.0125, 12.0025, 13.1, 14.1, np.nan],
        engine_arrival_s=[10.0055, 11.0135, 12.0035, np.nan, 14.2, np.nan],
        scheduled_s=[10.0155, 11.0135, 12.1035, np.nan, 14.3, np.nan],
        first_token_s=[10.1, 11.3, 12.5, np.nan, 14.5, np.nan],
        last_token_s=[10.6, 11.3, 13.5, np.nan, 31.0, np.nan],
        status=[COMPLETED, COMPLETED, COMPLETED, FAILED, COMPLETED, IN_FLIGHT],
    )
    return RunRecord(
        fleet="fleet",
        load_kind="closed_loop",
        load=6,
        replication=0,
        expert_names=("expert-0", "expert-1"),
        class_names=("class-0", "class-1"),
        requests=requests,
        gaps=make_gaps([0, 0, 1], [0.04, 0.14, 0.05], [9, 1, 20]),
        window_s=(10.0, 30.0),
        replicas=(
            replace(REPLICA, utilization=0.75, batch_size=10.0, kv_usage_max=0.4, preemptions=2),
            replace(REPLICA, expert_index=1, utilization=0.25, batch_size=2.0, kv_usage_max=0.9, preemptions=1),
        ),
        router=RouterStats(utilization=0.3, requests=0.1),
    )


def metrics(
    run: RunRecord | None = None, slo: SloSpec | None = None, **fleet: float | None
) -> dict[str, dict[str, float]]:
    rows = run_metrics(run or small_run(), make_fleet("fleet", 2, **fleet), slo)  # type: ignore[arg-type]
    return {row["expert"]: row for row in rows}


def approx(value: float) -> object:
    return pytest.approx(value, rel=1e-9, nan_ok=True)


def test_counts_are_of_the_whole_run_and_measured_of_the_window() -> None:
    rows = metrics()
    names = ("sent", "completed", "failed", "in_flight", "measured", "preemptions")
    assert {expert: tuple(row[name] for name in names) for expert, row in rows.items()} == {
        "all": (6, 4, 1, 1, 3, 3),
        "expert-0": (3, 3, 0, 0, 2, 2),
        "expert-1": (2, 1, 1, 0, 1, 1),
    }


def test_throughputs_are_per_second_of_the_window() -> None:
    row = metrics()["all"]
    assert row["request_throughput"] == approx(3 / 20)
    assert row["output_throughput"] == approx(33 / 20)
    assert row["total_token_throughput"] == approx((33 + 600) / 20)


def test_ttft_and_e2el_start_at_the_send() -> None:
    row = metrics()["expert-0"]
    assert row["mean_ttft_ms"] == approx((100 + 300) / 2)
    assert row["median_ttft_ms"] == approx(200)
    assert row["p99_ttft_ms"] == approx(298)
    assert row["mean_e2el_ms"] == approx((600 + 300) / 2)


def test_tpot_leaves_out_the_first_token_and_requests_of_one_token() -> None:
    rows = metrics()
    assert rows["expert-0"]["mean_tpot_ms"] == approx(50)
    assert rows["all"]["mean_tpot_ms"] == approx(50)


def test_itl_pools_every_gap_of_every_request() -> None:
    rows = metrics()
    assert rows["expert-0"]["mean_itl_ms"] == approx((9 * 40 + 140) / 10)
    assert rows["expert-0"]["median_itl_ms"] == approx(40)
    assert rows["expert-0"]["p99_itl_ms"] == approx(float(np.percentile([40] * 9 + [140], 99)))
    assert rows["all"]["mean_itl_ms"] == approx((9 * 40 + 140 + 20 * 50) / 30)


def test_waits_leave_out_the_network() -> None:
    row = metrics()["expert-0"]
    assert row["mean_router_wait_ms"] == approx((2 + 0) / 2)
    assert row["mean_router_service_ms"] == approx(1)
    assert row["mean_front_end_wait_ms"] == approx((0 + 10) / 2)
    assert row["mean_front_end_service_ms"] == approx(1)
    assert row["mean_engine_queue_ms"] == approx((10 + 0) / 2)


def test_without_a_router_its_figures_are_unknown_and_the_front_end_follows_the_send() -> None:
    row = metrics(router=False)["expert-0"]
    for name in ("mean_router_wait_ms", "p99_router_service_ms", "misrouted_share"):
        assert np.isnan(row[name])
    assert row["mean_front_end_wait_ms"] == approx((4.5 + 12.5) / 2)


def test_goodput_counts_requests_that_meet_every_bound_and_takes_an_undefined_tpot_as_met() -> None:
    row = metrics(slo=SloSpec(ttft_ms=350, tpot_ms=40))["all"]
    assert row["request_goodput"] == approx(1 / 20)  # the request of one token; the others miss a bound
    assert row["good_share"] == approx(1 / 4)  # of three completed and one failed in the window
    assert metrics(slo=SloSpec(ttft_ms=350))["all"]["request_goodput"] == approx(2 / 20)
    assert np.isnan(metrics()["all"]["request_goodput"])


def test_engine_averages_weigh_the_batch_by_busy_time() -> None:
    row = metrics()["all"]
    assert row["utilization"] == approx(0.5)
    assert row["batch_size"] == approx((10 * 0.75 + 2 * 0.25) / 1)
    assert row["kv_usage_max"] == 0.9
    assert row["running"] == 10.0
    assert row["router_utilization"] == 0.3


def test_misrouted_share_is_of_the_measured_requests() -> None:
    rows = metrics()
    assert rows["all"]["misrouted_share"] == approx(1 / 3)
    assert rows["expert-0"]["misrouted_share"] == approx(1 / 2)


def test_cost_per_million_output_tokens() -> None:
    row = metrics(price_per_hour=2.0)["all"]
    assert (row["gpus"], row["cost_per_hour"]) == (2, 4.0)
    assert row["cost_per_million_output_tokens"] == approx(4.0 / (33 / 20 * 3600) * 1e6)
    assert np.isnan(metrics(price_per_hour=None)["all"]["cost_per_million_output_tokens"])


def test_without_completions_latencies_are_unknown_and_throughput_is_zero() -> None:
    run = replace(small_run(), window_s=(100.0, 200.0), gaps=make_gaps())
    row = metrics(run, SloSpec(ttft_ms=100))["all"]
    assert row["measured"] == 0
    assert row["request_throughput"] == 0
    unknown = [name for name in row if name.endswith("_ms")] + ["cost_per_million_output_tokens", "good_share"]
    assert [name for name in unknown if not np.isnan(row[name])] == []


def test_a_window_of_no_length_has_no_throughput() -> None:
    run = replace(small_run(), window_s=(100.0, 100.0))
    assert np.isnan(metrics(run)["all"]["output_throughput"])


def test_rows_have_the_documented_columns_in_order() -> None:
    assert all(tuple(row) == replication_columns() for row in metrics().values())


gap_lists = st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 30)), min_size=1, max_size=40)


@given(gap_lists, st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_weighted_percentiles_are_those_of_the_expanded_list(
    gaps: list[tuple[float, int]], percents: list[float]
) -> None:
    values, weights = (np.array(column) for column in zip(*sorted(gaps), strict=True))
    expanded = np.repeat(values, weights)
    assert weighted_percentiles(values, weights, percents) == pytest.approx(np.percentile(expanded, percents))


@given(gap_lists)
def test_weighted_mean_and_deviation_are_those_of_the_expanded_list(gaps: list[tuple[float, int]]) -> None:
    values, weights = (np.array(column) for column in zip(*gaps, strict=True))
    found, expanded = weighted_distribution(values, weights), np.repeat(values, weights)
    assert found.mean == pytest.approx(expanded.mean())
    assert found.std == pytest.approx(expanded.std(), abs=1e-6)
