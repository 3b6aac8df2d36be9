"""The four claims of arXiv 2404.15153v2's abstract, on simulated results of ``examples/paper.yaml``.

The paper's tables are not at hand and it ran another engine, so what can be tested is the direction of each claim.
"""

from pathlib import Path

import pytest

from sim import load_fleet, simulate
from sim.spec import ALL_EXPERTS

PAPER = Path(__file__).parent.parent / "examples" / "paper.yaml"
USERS = (1, 10, 50, 100, 200, 500, 1000)
SMALL = ("8 x 8B bf16", "8 x 8B fp8", "8 x 8B awq")
LARGE = ("8 x 70B awq", "4 x 70B fp8 TP2", "2 x 70B bf16 TP4")
TENSOR_PARALLEL = ("70B bf16 TP8, no router", "8B bf16 TP8, no router")

Figures = dict[tuple[str, int], dict[str, float]]


@pytest.fixture(scope="module")
def figures() -> Figures:
    """The figures of every whole fleet by its name and the number of users."""
    rows = simulate(load_fleet(PAPER), users=USERS, replications=1).summary_rows
    return {(row["fleet"], round(row["users"])): row for row in rows if row["expert"] == ALL_EXPERTS}


def router_ms(row: dict[str, float]) -> float:
    return row["mean_router_wait_ms"] + row["mean_router_service_ms"]


def users_within(figures: Figures, fleet: str, metric: str, bound: float) -> int:
    """Largest of USERS up to which a metric stays below a bound."""
    held = 0
    for users in USERS:
        if figures[fleet, users][metric] >= bound:
            break
        held = users
    return held


def test_claim_1_the_router_adds_minimal_latency(figures: Figures) -> None:
    for fleet in SMALL + LARGE:
        for users in USERS:
            row = figures[fleet, users]
            assert router_ms(row) < 0.05 * row["mean_ttft_ms"], (
                f"{fleet}, {users} users: {router_ms(row):.2f} of {row['mean_ttft_ms']:.1f} ms TTFT in the router"
            )


def test_claim_2_the_expert_configuration_dominates(figures: Figures) -> None:
    rows = [figures[fleet, 1000] for fleet in SMALL + LARGE]
    throughputs = [row["output_throughput"] for row in rows]
    router_share = max(router_ms(row) / row["mean_e2el_ms"] for row in rows)
    between = max(throughputs) / min(throughputs)
    assert between > 5, f"best over worst configuration: {between:.1f}"
    assert router_share < 0.01, f"largest share of the router in E2E latency: {router_share:.2%}"


@pytest.mark.parametrize("fleet", LARGE)
def test_claim_3_large_experts_are_stable_at_moderate_concurrency(figures: Figures, fleet: str) -> None:
    alone, moderate, many = (figures[fleet, users]["median_tpot_ms"] for users in (1, 10, 1000))
    assert moderate < 1.5 * alone, f"TPOT {alone:.1f} ms alone, {moderate:.1f} ms with 10 users"
    assert many > 4 * alone, f"TPOT {alone:.1f} ms alone, only {many:.1f} ms with 1,000 users"


@pytest.mark.parametrize("baseline", TENSOR_PARALLEL)
@pytest.mark.parametrize("small", SMALL)
def test_claim_4_small_experts_hold_wider_than_tensor_parallel(figures: Figures, small: str, baseline: str) -> None:
    ours = users_within(figures, small, "p99_ttft_ms", 1000)
    theirs = users_within(figures, baseline, "p99_ttft_ms", 1000)
    assert ours > theirs, f"p99 TTFT below 1 s up to {ours} users, baseline up to {theirs}"
    throughput = figures[small, 1000]["output_throughput"] / figures[baseline, 1000]["output_throughput"]
    assert throughput > 2, f"throughput at 1,000 users {throughput:.1f} times the baseline's"
