"""Each policy on cases small enough to do by hand; the random ones by their shares."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.policies import (
    REPLICA_POLICIES,
    Pool,
    by_class,
    by_class_with_spill_over,
    least_outstanding,
    power_of_two_choices,
    random,
    round_robin,
)
from sim.request import Request
from sim.routing import confusion
from sim.spec import ReplicaPolicy, RouterSpec
from tests.fleets import FREE_ROUTER

DRAWS = 20_000
STANDARD_ERRORS = 4  # by chance in one of 16,000; the seeds are fixed


@dataclass(slots=True, eq=False)
class Seen:
    """All that a policy may look at."""

    outstanding: int


def pool(*outstanding: int) -> Pool[Seen]:
    return Pool([Seen(count) for count in outstanding])


def draws(*values: float) -> Callable[[], float]:
    return iter(values).__next__


def never() -> float:
    raise AssertionError("this policy draws nothing")


def picks(policy: str, of: Pool[Seen], uniform: Callable[[], float], times: int) -> Counter[int]:
    """How often each replica is picked; nobody answers, and the router does not count."""
    chosen = Counter(id(REPLICA_POLICIES[policy](of, uniform)) for _ in range(times))
    return Counter({index: chosen[id(replica)] for index, replica in enumerate(of.replicas)})


def assert_share(count: int, probability: float) -> None:
    error = sqrt(DRAWS * probability * (1 - probability))
    assert abs(count - DRAWS * probability) <= STANDARD_ERRORS * error


def test_every_policy_of_the_file_has_its_function() -> None:
    assert set(REPLICA_POLICIES) == set(get_args(ReplicaPolicy))


@pytest.mark.parametrize("policy", get_args(ReplicaPolicy))
@given(outstanding=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_a_policy_picks_one_of_the_pool_and_changes_no_count(policy: str, outstanding: list[int], seed: int) -> None:
    of = pool(*outstanding)
    assert REPLICA_POLICIES[policy](of, np.random.default_rng(seed).random) in of.replicas
    assert [replica.outstanding for replica in of.replicas] == outstanding


# ------------------------------------------------------------------------------------------------- among replicas


def test_random_picks_by_the_number_drawn() -> None:
    of = pool(9, 0, 5)
    chosen = [random(of, draws(u)) for u in (0.0, 0.33, 0.34, 0.66, 0.67, np.nextafter(1.0, 0.0))]
    assert [of.replicas.index(replica) for replica in chosen] == [0, 0, 1, 1, 2, 2]


def test_random_picks_all_as_often() -> None:
    for count in picks("random", pool(9, 0, 5), np.random.default_rng(1).random, DRAWS).values():
        assert_share(count, 1 / 3)


def test_round_robin_takes_turns_whatever_is_outstanding() -> None:
    of = pool(9, 0, 5)
    assert [of.replicas.index(round_robin(of, never)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_pools_take_their_turns_apart() -> None:
    one, other = pool(0, 0), pool(0, 0)
    round_robin(one, never)
    assert other.replicas.index(round_robin(other, never)) == 0
    assert one.replicas.index(round_robin(one, never)) == 1


@pytest.mark.parametrize(("outstanding", "chosen"), [((3, 1, 2), 1), ((2, 1, 1), 1), ((0, 0, 0), 0), ((5,), 0)])
def test_least_outstanding_picks_the_fewest_and_the_first_of_them(outstanding: tuple[int, ...], chosen: int) -> None:
    of = pool(*outstanding)
    assert of.replicas.index(least_outstanding(of, never)) == chosen


@pytest.mark.parametrize(
    ("drawn", "compared"),
    [
        ((0.0, 0.0), {0, 1}),
        ((0.0, 0.99), {0, 2}),
        ((0.4, 0.0), {1, 2}),
        ((0.4, 0.99), {1, 0}),
        ((0.99, 0.0), {2, 0}),
        ((0.99, 0.99), {2, 1}),
    ],
)
def test_power_of_two_choices_compares_two_different_ones(drawn: tuple[float, float], compared: set[int]) -> None:
    for fewer in compared:  # whichever of the two has fewer is picked, and nobody else
        of = pool(*(2 if index == fewer else 3 if index in compared else 0 for index in range(3)))
        assert of.replicas.index(power_of_two_choices(of, draws(*drawn))) == fewer


def test_power_of_two_choices_of_one_draws_nothing() -> None:
    of = pool(7)
    assert power_of_two_choices(of, never) is of.replicas[0]


def test_power_of_two_choices_of_two_is_least_outstanding() -> None:
    rng = np.random.default_rng(2)
    of = pool(4, 3)
    assert picks("power_of_two_choices", of, rng.random, 100) == Counter({0: 0, 1: 100})


def test_power_of_two_choices_picks_by_rank() -> None:
    # Of n replicas all different, the one with r fewer than it is the better of a pair in n - 1 - r of n (n - 1) / 2.
    counts = picks("power_of_two_choices", pool(30, 10, 20, 0), np.random.default_rng(3).random, DRAWS)
    for index, rank in enumerate((3, 1, 2, 0)):
        assert_share(counts[index], (3 - rank) / 6)


def test_power_of_two_choices_among_equals_is_random() -> None:
    for count in picks("power_of_two_choices", pool(1, 1, 1), np.random.default_rng(4).random, DRAWS).values():
        assert_share(count, 1 / 3)


# --------------------------------------------------------------------------------------------------- among experts


def test_by_class_takes_the_preferred_expert() -> None:
    assert by_class([2, 0, 1]) == 2


@pytest.mark.parametrize(
    ("outstanding", "chosen"),
    [
        pytest.param([[0], [0], [0]], 2, id="nobody busy"),
        pytest.param([[0], [0], [3]], 2, id="one below its bound"),
        pytest.param([[0], [0], [4]], 0, id="at its bound"),
        pytest.param([[4], [0], [4]], 1, id="the first fallback as well"),
        pytest.param([[4], [4], [4]], 2, id="all alike"),
        pytest.param([[6], [5], [7]], 1, id="all, the last least of all"),
        pytest.param([[6], [11, 0], [7]], 1, id="all, by the mean over replicas"),
        pytest.param([[0], [0], [9, 0]], 0, id="9 > 2 x 4, though one of its replicas is idle"),
        pytest.param([[0], [0], [7, 0]], 2, id="7 < 2 x 4, though one of its replicas is over"),
    ],
)
def test_spill_over_goes_down_the_list_and_at_its_end_to_the_least_busy(
    outstanding: list[list[int]], chosen: int
) -> None:
    pools = [pool(*counts) for counts in outstanding]
    assert by_class_with_spill_over([2, 0, 1], pools, [4, 4, 4]) == chosen


def test_each_expert_is_saturated_at_its_own_bound() -> None:
    pools = [pool(5), pool(5)]
    assert by_class_with_spill_over([0, 1], pools, [6, 4]) == 0
    assert by_class_with_spill_over([0, 1], pools, [5, 6]) == 1
    assert by_class_with_spill_over([1], pools, [5, 5]) == 1  # nowhere to spill to


# ------------------------------------------------------------------------------------------------- the classifier

CLASSES = ("a", "b", "c")


def taken_for(spec: RouterSpec) -> Iterator[tuple[int, Counter[int]]]:
    for true in range(len(CLASSES)):
        misroute = confusion(spec, CLASSES, seed=5)
        assert misroute is not None
        request = Request(0, 0, class_index=true, prompt_tokens=1, output_tokens=1)
        yield true, Counter(misroute(request) for _ in range(DRAWS))


@pytest.mark.parametrize("spec", [None, FREE_ROUTER])
def test_a_classifier_that_is_always_right_draws_nothing(spec: RouterSpec | None) -> None:
    assert confusion(spec, CLASSES, seed=5) is None


def test_accuracy_is_the_share_taken_for_what_they_are() -> None:
    for true, counts in taken_for(FREE_ROUTER.model_copy(update={"accuracy": 0.8})):
        for other in range(len(CLASSES)):
            assert_share(counts[other], 0.8 if other == true else 0.1)


def test_the_rows_of_the_confusion_matrix_are_weights_and_missing_rows_are_accuracy() -> None:
    spec = FREE_ROUTER.model_copy(update={"confusion": {"a": {"a": 1.0, "c": 3.0}, "c": {"b": 2.0}}})
    shares = {0: (0.25, 0.0, 0.75), 1: (0.0, 1.0, 0.0), 2: (0.0, 1.0, 0.0)}
    for true, counts in taken_for(spec):
        for other, share in enumerate(shares[true]):
            assert_share(counts[other], share)
