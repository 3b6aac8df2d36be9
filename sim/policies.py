"""Router policies: plain functions over what a real router can see. The simulator and the gateway share them.

A policy sees the class the classifier gave the prompt and, per replica, the requests sent there and not yet answered
(the router's own count, so its age is zero). It never sees an output length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class ReplicaView(Protocol):
    """What a policy may look at."""

    outstanding: int


R = TypeVar("R", bound=ReplicaView)


@dataclass(slots=True)
class Pool(Generic[R]):
    """Replicas to choose from, and the turn of round robin among them."""

    replicas: Sequence[R]
    turn: int = 0


Uniform = Callable[[], float]
"""Returns one random number in [0, 1)."""


def random(pool: Pool[R], uniform: Uniform) -> R:
    """Any replica, each as likely."""
    return pool.replicas[int(uniform() * len(pool.replicas))]


def round_robin(pool: Pool[R], uniform: Uniform) -> R:
    """The replicas in turn."""
    replica = pool.replicas[pool.turn]
    pool.turn = (pool.turn + 1) % len(pool.replicas)
    return replica


def least_outstanding(pool: Pool[R], uniform: Uniform) -> R:
    """The replica with the fewest unanswered requests, the first of them on a tie."""
    return min(pool.replicas, key=_outstanding)


def power_of_two_choices(pool: Pool[R], uniform: Uniform) -> R:
    """The one with fewer unanswered requests of two different replicas drawn at random."""
    replicas = pool.replicas
    if len(replicas) == 1:
        return replicas[0]
    first = int(uniform() * len(replicas))
    second = (first + 1 + int(uniform() * (len(replicas) - 1))) % len(replicas)
    return min(replicas[first], replicas[second], key=_outstanding)


def _outstanding(replica: ReplicaView) -> int:
    return replica.outstanding


REPLICA_POLICIES: dict[str, Callable[[Pool[R], Uniform], R]] = {
    "random": random,
    "round_robin": round_robin,
    "least_outstanding": least_outstanding,
    "power_of_two_choices": power_of_two_choices,
}


def by_class(experts: Sequence[int]) -> int:
    """The preferred expert of the prompt's class (the Expert Router of arXiv 2404.15153)."""
    return experts[0]


def by_class_with_spill_over(experts: Sequence[int], pools: Sequence[Pool[R]], saturated_at: Sequence[float]) -> int:
    """The first expert of the class that is not saturated; when all are, the one with the fewest per replica.

    Args:
        experts: of the class, the preferred one first.
        pools: the replicas of each expert.
        saturated_at: per expert, the mean number of unanswered requests per replica from which it is saturated.
    """
    for expert in experts:
        replicas = pools[expert].replicas
        if sum(replica.outstanding for replica in replicas) < saturated_at[expert] * len(replicas):
            return expert
    return min(experts, key=lambda expert: _mean_outstanding(pools[expert]))


def _mean_outstanding(pool: Pool[R]) -> float:
    return sum(replica.outstanding for replica in pool.replicas) / len(pool.replicas)
