import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sim.spec import (
    ClassSpec,
    ClosedLoop,
    Distribution,
    Empirical,
    Exponential,
    Fixed,
    Lognormal,
    OpenLoop,
    Trace,
    Uniform,
    WorkloadSpec,
)
from sim.traffic import (
    BLOCK_REQUESTS,
    BLOCK_ROUNDS,
    ClosedLoopTraffic,
    OpenTraffic,
    TraceTable,
    TraceTraffic,
    TrafficBlock,
    TrafficRound,
    WorkloadData,
    mean_of,
    sample,
    sample_tokens,
)

NO_DATA = WorkloadData()
COLUMN = np.array([1.0, 2.0, 2.0, 10.0, 100.0])
DATA = WorkloadData(columns={("lengths.csv", "tokens"): COLUMN})
FROM_COLUMN = Empirical(file="lengths.csv", column="tokens")


def uniforms(n: int = 100_000, seed: int = 1) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random(n)


def z_of_mean(values: NDArray[Any], mean: float) -> float:
    return float((values.mean() - mean) / (values.std(ddof=1) / np.sqrt(len(values))))


def z_of_variance(values: NDArray[Any], variance: float) -> float:
    """Large-sample error of the variance, from the fourth moment, which any distribution with one has."""
    squares = (values - values.mean()) ** 2
    return float((squares.mean() - variance) / (squares.std() / np.sqrt(len(values))))


def chat(**load: Any) -> WorkloadSpec:
    return WorkloadSpec(
        classes={
            "chat": ClassSpec(
                share=3, prompt_tokens=Lognormal(mean=500, cv=1.0, max=4000), output_tokens=Exponential(mean=200)
            ),
            "code": ClassSpec(share=1, prompt_tokens=Uniform(min=100, max=900), output_tokens=Fixed(value=64)),
        },
        load=ClosedLoop(**({"users": 10, "think_time_s": Exponential(mean=5.0)} | load)),
    )


def open_loop(burstiness: float = 1.0, classes: dict[str, ClassSpec] | None = None) -> WorkloadSpec:
    return WorkloadSpec(classes=classes or chat().classes, load=OpenLoop(rate_rps=1.0, burstiness=burstiness))


def rounds(traffic: ClosedLoopTraffic, count: int) -> list[TrafficRound]:
    return [traffic.round(k) for k in range(count)]


def joined(blocks: list[TrafficBlock]) -> TrafficBlock:
    return TrafficBlock(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))


# ------------------------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    ("distribution", "variance"),
    [
        (Uniform(min=2.0, max=8.0), 36 / 12),
        (Exponential(mean=3.0), 9.0),
        (Lognormal(mean=500.0, cv=0.8, min=0), (0.8 * 500) ** 2),
        (FROM_COLUMN, float(COLUMN.var())),
    ],
    ids=lambda value: getattr(value, "distribution", ""),
)
def test_samples_have_the_mean_and_variance_of_theory(distribution: Distribution, variance: float) -> None:
    values = sample(distribution, uniforms(), DATA)
    z_mean, z_variance = z_of_mean(values, mean_of(distribution, DATA)), z_of_variance(values, variance)
    assert abs(z_mean) < 4, f"mean is {z_mean:.1f} standard errors from {mean_of(distribution, DATA)}"
    assert abs(z_variance) < 4, f"variance is {z_variance:.1f} standard errors from {variance}"


def test_fixed_is_always_its_value() -> None:
    assert (sample(Fixed(value=0.25), uniforms(10), NO_DATA) == 0.25).all()
    assert mean_of(Fixed(value=0.25), NO_DATA) == 0.25


def test_exponential_quantile_is_the_inverse_of_its_cdf() -> None:
    values = sample(Exponential(mean=2.0), np.array([0.0, 0.5, 0.99]), NO_DATA)
    np.testing.assert_allclose(1 - np.exp(-values / 2.0), [0.0, 0.5, 0.99], atol=1e-15)


def test_lognormal_median_is_mean_over_root_of_one_plus_cv_squared() -> None:
    median = sample(Lognormal(mean=500, cv=2.0), np.array([0.5]), NO_DATA)
    np.testing.assert_allclose(median, 500 / np.sqrt(5))


def test_lognormal_is_clipped_to_its_bounds() -> None:
    values = sample(Lognormal(mean=100, cv=3.0, min=20, max=300), uniforms(10_000), NO_DATA)
    assert (values.min(), values.max()) == (20, 300)


def test_empirical_draws_each_value_as_often_as_the_file_holds_it() -> None:
    values = sample(FROM_COLUMN, (np.arange(500) + 0.5) / 500, DATA)
    assert dict(zip(*np.unique(values, return_counts=True), strict=True)) == {1: 100, 2: 200, 10: 100, 100: 100}


def test_empirical_is_clipped_to_its_max() -> None:
    clipped = FROM_COLUMN.model_copy(update={"max": 50.0})
    assert sample(clipped, uniforms(1000), DATA).max() == 50


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 1000, 999_983])
def test_largest_uniform_stays_within_an_empirical_column(n: int) -> None:
    data = WorkloadData(columns={("lengths.csv", "tokens"): np.arange(n, dtype=np.float64)})
    assert sample(FROM_COLUMN, np.array([np.nextafter(1.0, 0.0)]), data) == n - 1


def test_unread_column_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"column 'tokens' of lengths\.csv is not in the workload data; pass what"):
        sample(FROM_COLUMN, uniforms(1), NO_DATA)


def test_uniform_tokens_include_both_ends_equally_often() -> None:
    counts = np.bincount(sample_tokens(Uniform(min=3, max=6), (np.arange(4000) + 0.5) / 4000, NO_DATA))
    assert counts.tolist() == [0, 0, 0, 1000, 1000, 1000, 1000]


@pytest.mark.parametrize(
    "distribution",
    [Fixed(value=0), Uniform(min=0, max=3), Exponential(mean=0.5), Lognormal(mean=0.1, cv=1, min=0)],
    ids=lambda distribution: distribution.distribution,
)
def test_token_counts_are_at_least_one(distribution: Distribution) -> None:
    tokens = sample_tokens(distribution, uniforms(1000), NO_DATA)
    assert tokens.min() == 1
    assert tokens.dtype == np.int64


# --------------------------------------------------------------------------------------------------- closed loop


@pytest.mark.parametrize("field", TrafficRound._fields)
def test_a_user_sends_the_same_whatever_the_number_of_users(field: str) -> None:
    few = rounds(ClosedLoopTraffic(chat(), 7, 1, NO_DATA), BLOCK_ROUNDS + 2)
    many = rounds(ClosedLoopTraffic(chat(), 1000, 1, NO_DATA), BLOCK_ROUNDS + 2)
    for of_few, of_many in zip(few, many, strict=True):
        np.testing.assert_array_equal(getattr(of_few, field), getattr(of_many, field)[:7])


def test_same_seed_same_rounds_in_any_order_and_another_seed_other_rounds() -> None:
    traffic = ClosedLoopTraffic(chat(), 100, 1, NO_DATA)
    forward = rounds(traffic, 40)
    for k in (39, 0, 17, 16, 15):
        for again, first in zip(traffic.round(k), forward[k], strict=True):
            np.testing.assert_array_equal(again, first)
    other = ClosedLoopTraffic(chat(), 100, 2, NO_DATA).round(0)
    assert (other.prompt_tokens != forward[0].prompt_tokens).any()


def test_rounds_of_a_user_differ_within_and_between_blocks() -> None:
    sent = [tuple(r.prompt_tokens) for r in rounds(ClosedLoopTraffic(chat(), 20, 1, NO_DATA), 3 * BLOCK_ROUNDS)]
    assert len(set(sent)) == 3 * BLOCK_ROUNDS


@pytest.mark.parametrize(
    ("changed", "may_move"),
    [
        ({"think_time_s": Lognormal(mean=1.0, cv=2.0)}, {"think_s"}),
        ({"prompt_tokens": Fixed(value=7)}, {"prompt_tokens"}),
        ({"output_tokens": Uniform(min=1, max=9)}, {"output_tokens"}),
    ],
    ids=["think_time", "prompt_tokens", "output_tokens"],
)
def test_changing_one_distribution_moves_no_other_draw(changed: dict[str, Any], may_move: set[str]) -> None:
    before = chat()
    if "think_time_s" in changed:
        after = chat(**changed)
    else:
        classes = {name: spec.model_copy(update=changed) for name, spec in before.classes.items()}
        after = before.model_copy(update={"classes": classes})
    moved = set()
    for k in range(1, 20):
        old = ClosedLoopTraffic(before, 50, 1, NO_DATA).round(k)
        new = ClosedLoopTraffic(after, 50, 1, NO_DATA).round(k)
        moved |= {name for name in TrafficRound._fields if (getattr(old, name) != getattr(new, name)).any()}
    assert moved == may_move


def test_causes_are_uncorrelated() -> None:
    one_class = WorkloadSpec(
        classes={"chat": ClassSpec(prompt_tokens=Uniform(min=1, max=10**6), output_tokens=Uniform(min=1, max=10**6))},
        load=ClosedLoop(users=10_000, think_time_s=Uniform(min=0, max=1)),
    )
    drawn = ClosedLoopTraffic(one_class, 10_000, 1, NO_DATA).round(1)
    following = ClosedLoopTraffic(one_class, 10_000, 1, NO_DATA).round(2)
    columns = [drawn.prompt_tokens, drawn.output_tokens, drawn.think_s, following.prompt_tokens]
    correlations = np.asarray(np.corrcoef(np.array(columns, dtype=np.float64)))[np.triu_indices(4, k=1)]
    z = np.abs(correlations).max() * np.sqrt(10_000)
    assert z < 4, f"largest correlation is {z:.1f} standard errors from 0"


def test_classes_come_by_share_with_their_own_lengths() -> None:
    drawn = ClosedLoopTraffic(chat(), 20_000, 1, NO_DATA).round(0)
    is_code = drawn.class_index == 1
    z = (is_code.mean() - 0.25) / np.sqrt(0.25 * 0.75 / 20_000)
    assert abs(z) < 4, f"share of code is {z:.1f} standard errors from 0.25"
    assert (drawn.output_tokens[is_code] == 64).all()
    assert drawn.prompt_tokens[is_code].min() >= 100
    assert drawn.prompt_tokens[is_code].max() <= 900
    assert drawn.prompt_tokens[~is_code].max() > 900


def test_shares_need_not_add_up_to_one_and_every_class_index_is_valid() -> None:
    tenths = {
        f"c{i}": ClassSpec(share=0.1, prompt_tokens=Fixed(value=1), output_tokens=Fixed(value=1)) for i in range(7)
    }
    workload = WorkloadSpec(classes=tenths, load=ClosedLoop(users=1))
    index = ClosedLoopTraffic(workload, 20_000, 1, NO_DATA).round(0).class_index
    counts = np.bincount(index)
    chi_squared = ((counts - 20_000 / 7) ** 2 / (20_000 / 7)).sum()
    assert len(counts) == 7
    assert chi_squared < 22.5, f"chi-squared of the class counts is {chi_squared:.1f}; 0.1 % of samples exceed 22.5"


def test_users_start_at_once_or_evenly_over_the_ramp_up() -> None:
    assert ClosedLoopTraffic(chat(), 4, 1, NO_DATA).round(0).think_s.tolist() == [0, 0, 0, 0]
    assert ClosedLoopTraffic(chat(ramp_up_s=10.0), 4, 1, NO_DATA).round(0).think_s.tolist() == [0, 2.5, 5, 7.5]


def test_think_times_have_the_mean_of_theory() -> None:
    traffic = ClosedLoopTraffic(chat(), 1000, 1, NO_DATA)
    think_s = np.concatenate([traffic.round(k).think_s for k in range(1, 41)])
    z = z_of_mean(think_s, 5.0)
    assert abs(z) < 4, f"mean think time is {z:.1f} standard errors from 5 s"


# --------------------------------------------------------------------------------------------- open loop and trace


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_with_the_rate_and_variation_asked_for(burstiness: float) -> None:
    rate_rps = 8.0
    blocks = list(itertools.islice(OpenTraffic(open_loop(burstiness), rate_rps, 1, NO_DATA).blocks(), 25))
    gaps_s = np.diff(joined(blocks).arrival_s, prepend=0.0)
    z_mean = z_of_mean(gaps_s, 1 / rate_rps)
    z_variance = z_of_variance(gaps_s, 1 / (burstiness * rate_rps**2))
    assert abs(z_mean) < 4, f"mean gap is {z_mean:.1f} standard errors from 1/rate"
    assert abs(z_variance) < 4, f"variance of the gaps is {z_variance:.1f} standard errors from 1/(shape rate^2)"


def test_poisson_gaps_have_the_long_lulls_of_an_exponential() -> None:
    blocks = list(itertools.islice(OpenTraffic(open_loop(), 1.0, 1, NO_DATA).blocks(), 25))
    gaps_s = np.diff(joined(blocks).arrival_s, prepend=0.0)
    share = np.exp(-3.0)
    z = ((gaps_s > 3.0).mean() - share) / np.sqrt(share * (1 - share) / len(gaps_s))
    assert abs(z) < 4, f"share of gaps above three means is {z:.1f} standard errors from e^-3"


def test_successive_gaps_are_uncorrelated_within_and_across_blocks() -> None:
    blocks = list(itertools.islice(OpenTraffic(open_loop(), 1.0, 1, NO_DATA).blocks(), 25))
    gaps_s = np.diff(joined(blocks).arrival_s, prepend=0.0)
    for lag in (1, BLOCK_REQUESTS):
        z = np.corrcoef(gaps_s[:-lag], gaps_s[lag:])[0, 1] * np.sqrt(len(gaps_s) - lag)
        assert abs(z) < 4, f"autocorrelation at lag {lag} is {z:.1f} standard errors from 0"


def test_a_higher_rate_is_the_same_traffic_faster() -> None:
    slow = next(OpenTraffic(open_loop(), 2.0, 1, NO_DATA).blocks())
    fast = next(OpenTraffic(open_loop(), 8.0, 1, NO_DATA).blocks())
    np.testing.assert_allclose(fast.arrival_s, slow.arrival_s / 4)
    np.testing.assert_array_equal(fast.prompt_tokens, slow.prompt_tokens)


def test_blocks_start_again_the_same_and_go_on_in_order() -> None:
    traffic = OpenTraffic(open_loop(0.5), 2.0, 1, NO_DATA)
    first, again = (joined(list(itertools.islice(traffic.blocks(), 3))) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(first.arrival_s) == 3 * BLOCK_REQUESTS
    assert (np.diff(first.arrival_s) >= 0).all()
    assert (first.prompt_tokens[:BLOCK_REQUESTS] != first.prompt_tokens[BLOCK_REQUESTS : 2 * BLOCK_REQUESTS]).any()


def test_open_loop_lengths_do_not_depend_on_the_arrival_process() -> None:
    poisson = next(OpenTraffic(open_loop(1.0), 2.0, 1, NO_DATA).blocks())
    bursty = next(OpenTraffic(open_loop(0.2), 2.0, 1, NO_DATA).blocks())
    assert (poisson.arrival_s != bursty.arrival_s).any()
    np.testing.assert_array_equal(poisson.prompt_tokens, bursty.prompt_tokens)
    np.testing.assert_array_equal(poisson.output_tokens, bursty.output_tokens)


def replay(time_scale: float, requests: int) -> TraceTraffic:
    workload = WorkloadSpec(classes=chat().classes, load=Trace(file="trace.csv", format="azure", time_scale=time_scale))
    table = TraceTable(
        arrival_s=np.linspace(0.0, 0.5 * (requests - 1), requests),
        prompt_tokens=np.arange(requests) + 1,
        output_tokens=np.arange(requests) * 2 + 1,
    )
    return TraceTraffic(workload, WorkloadData(trace=table), 1)


def test_trace_is_replayed_whole_with_its_own_lengths_and_scaled_times() -> None:
    traffic = replay(time_scale=2.0, requests=BLOCK_REQUESTS + 3)
    sent = joined(list(traffic.blocks()))
    assert len(traffic) == len(sent.arrival_s) == BLOCK_REQUESTS + 3
    np.testing.assert_array_equal(sent.arrival_s, np.arange(BLOCK_REQUESTS + 3) * 1.0)
    np.testing.assert_array_equal(sent.prompt_tokens, np.arange(BLOCK_REQUESTS + 3) + 1)
    np.testing.assert_array_equal(sent.output_tokens, np.arange(BLOCK_REQUESTS + 3) * 2 + 1)


def test_trace_classes_come_by_share() -> None:
    sent = joined(list(replay(time_scale=1.0, requests=10_000).blocks()))
    z = ((sent.class_index == 1).mean() - 0.25) / np.sqrt(0.25 * 0.75 / 10_000)
    assert abs(z) < 4, f"share of code is {z:.1f} standard errors from 0.25"


def test_each_kind_of_traffic_refuses_another_kind_of_load() -> None:
    with pytest.raises(TypeError, match="ClosedLoopTraffic needs a closed_loop workload, got open_loop"):
        ClosedLoopTraffic(open_loop(), 1, 1, NO_DATA)
    with pytest.raises(TypeError, match="OpenTraffic needs an open_loop workload, got closed_loop"):
        OpenTraffic(chat(), 1.0, 1, NO_DATA)
    with pytest.raises(TypeError, match="TraceTraffic needs a trace workload, got closed_loop"):
        TraceTraffic(chat(), NO_DATA, 1)


def test_trace_that_was_not_read_says_what_to_pass() -> None:
    workload = WorkloadSpec(classes=chat().classes, load=Trace(file="trace.csv", format="azure"))
    with pytest.raises(ValueError, match=r"trace trace\.csv was not read; pass what read_workload_data returns"):
        TraceTraffic(workload, NO_DATA, 1)
