"""The four claims of arXiv 2404.15153v2's abstract, on simulated results of ``examples/paper.yaml``.

The paper's tables are not at hand and it ran another engine, so what can be tested is the direction of each claim.
"""

from pathlib import Path

import pandas as pd
import pytest

from sim import load_fleet, simulate

PAPER = Path(__file__).parent.parent / "examples" / "paper.yaml"
USERS = [1, 10, 100, 1000]
SMALL = ["8 x 8B bf16", "8 x 8B fp8", "8 x 8B awq"]
LARGE = ["8 x 70B awq", "4 x 70B fp8 TP2", "2 x 70B bf16 TP4"]
TENSOR_PARALLEL = ["70B bf16 TP8, no router", "8B bf16 TP8, no router"]


@pytest.fixture(scope="module")
def summary() -> pd.DataFrame:
    result = simulate(load_fleet(PAPER), users=USERS, replications=1)
    whole = result.summary[result.summary["expert"] == "all"]
    return whole.set_index(["fleet", "users"])


def test_claim_1_the_router_adds_minimal_latency(summary: pd.DataFrame) -> None:
    for fleet in SMALL + LARGE:
        for users in USERS:
            row = summary.loc[(fleet, users)]
            router_ms = row["mean_router_wait_ms"] + row["mean_router_service_ms"]
            assert router_ms < 0.05 * row["mean_ttft_ms"], (
                f"{fleet} at {users} users: {router_ms:.2f} ms in the router of {row['mean_ttft_ms']:.1f} ms TTFT"
            )


def test_claim_2_the_expert_configuration_dominates(summary: pd.DataFrame) -> None:
    at_most = summary.xs(1000, level="users")
    throughput = at_most.loc[SMALL + LARGE, "output_throughput"]
    between_configurations = throughput.max() / throughput.min()
    router_share = (at_most["mean_router_wait_ms"] + at_most["mean_router_service_ms"]) / at_most["mean_e2el_ms"]
    assert between_configurations > 5, f"best over worst configuration: {between_configurations:.1f}"
    assert router_share.loc[SMALL + LARGE].max() < 0.01, f"router's share of E2E: {router_share.max():.2%}"


def test_claim_3_large_experts_are_stable_at_moderate_concurrency_only(summary: pd.DataFrame) -> None:
    for fleet in LARGE:
        tpot = summary.loc[fleet, "median_tpot_ms"]
        ttft = summary.loc[fleet, "p99_ttft_ms"]
        assert tpot[10] < 1.5 * tpot[1], f"{fleet}: TPOT {tpot[1]:.1f} ms alone, {tpot[10]:.1f} ms with 10 users"
        assert tpot[1000] > 4 * tpot[1], f"{fleet}: TPOT {tpot[1]:.1f} ms alone, {tpot[1000]:.1f} ms with 1,000 users"
        assert ttft[1000] > 3000, f"{fleet}: p99 TTFT {ttft[1000]:.0f} ms with 1,000 users"


def test_claim_4_small_experts_hold_over_a_wider_range_than_tensor_parallel_baselines(summary: pd.DataFrame) -> None:
    def capacity(fleet: str) -> float:
        """Largest number of users with p99 TTFT below one second."""
        fine = summary.loc[fleet, "p99_ttft_ms"] < 1000
        return max((users for users in USERS if fine[users]), default=0)

    for small in SMALL:
        for baseline in TENSOR_PARALLEL:
            assert capacity(small) > capacity(baseline), (
                f"{small}: p99 TTFT below 1 s up to {capacity(small)} users, {baseline}: up to {capacity(baseline)}"
            )
            at_many = summary.xs(1000, level="users")["output_throughput"]
            assert at_many[small] > 2 * at_many[baseline], f"{small} {at_many[small]:.0f}, {baseline} {at_many[baseline]:.0f}"
