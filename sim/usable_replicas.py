"""The choice among the replicas that can be used at the moment, which the gateway and the simulator share.

A replica that is out gets nothing, one on trial one request, and one that has just come back no more than its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sim.policies import REPLICA_POLICIES, Pool, ReplicaView, Uniform, by_class, by_class_with_spill_over
from sim.replica_health import SLOW_START_S, ReplicaHealth
from sim.spec import RouterSpec


class UsableReplica(ReplicaView, Protocol):
    """What is kept of a replica.

    Attributes:
        cap: how many unanswered requests it may have.
        sent: requests sent there so far.
        return_counts: when it last came back, and what it and all together had been sent by then.
    """

    cap: float
    health: ReplicaHealth
    sent: int
    return_counts: tuple[float, int, int] | None


U = TypeVar("U", bound=UsableReplica)


@dataclass(frozen=True, slots=True)
class Wish:
    """Where a request may go.

    Attributes:
        experts: indices, the preferred one first.
        anywhere: whether the replica policy chooses among all of them at once.
    """

    experts: tuple[int, ...]
    anywhere: bool = False


class NobodyUpError(Exception):
    """No replica that a request may go to can be used."""


class UsableReplicas(Generic[U]):
    """The policy of one fleet, applied to the replicas that can be used at the moment.

    Attributes:
        by_expert: the replicas of each expert.
    """

    def __init__(
        self, spec: RouterSpec, by_expert: list[list[U]], uniform: Uniform, saturated_at: Sequence[float]
    ) -> None:
        """Begin with every replica as its health says.

        Args:
            spec: names the policies.
            by_expert: the replicas of each expert.
            uniform: gives random numbers.
            saturated_at: per expert, see ``sim.policies.by_class_with_spill_over``.
        """
        self.by_expert = by_expert
        self._uniform = uniform
        self._pools: list[Pool[U]] = [Pool(()) for _ in by_expert]
        self._everywhere: Pool[U] = Pool(())
        self._spills = spec.policy == "class_with_spill_over"
        self._saturated_at = saturated_at
        self._among = REPLICA_POLICIES[spec.policy if spec.policy in REPLICA_POLICIES else spec.replica_policy]

    def choose(self, wish: Wish, now_s: float, besides: U | None = None) -> U | None:
        """Return a replica with a free place, chosen by the policy; None when all that can be used are full.

        Args:
            wish: where the request may go.
            now_s: the time.
            besides: a replica that has already failed the request.

        Raises:
            NobodyUpError: nothing can be used.
        """
        pools = self._pools
        experts = []
        for expert in wish.experts:
            usable = [r for r in self.by_expert[expert] if r.health.usable and r is not besides]
            if usable:
                pools[expert].replicas = usable
                experts.append(expert)
        if not experts:
            raise NobodyUpError
        if wish.anywhere:
            pool = self._everywhere
            usable = [replica for expert in experts for replica in pools[expert].replicas]
        else:
            spills = self._spills and len(experts) > 1
            chosen = by_class_with_spill_over(experts, pools, self._saturated_at) if spills else by_class(experts)
            pool = pools[chosen]
            usable = list(pool.replicas)
        free = [
            r for r in usable if r.outstanding < r.cap and r.health.open and not self._has_its_share(r, usable, now_s)
        ]
        if not free:
            return None
        pool.replicas = free
        pool.turn %= len(free)
        return self._among(pool, self._uniform)

    def retry_after_s(self, wish: Wish, now_s: float) -> float:
        """Return after how long a refused request is worth another try: when the first of the replicas may be back."""
        waits_s = [r.health.retry_after_s(now_s) for expert in wish.experts for r in self.by_expert[expert]]
        return max(1.0, min(waits_s))

    def count_sent(self, replica: U) -> int:
        """Count a request that goes to this replica; return the epoch of its health, see there."""
        replica.outstanding += 1
        replica.sent += 1
        return replica.health.sent()

    def _has_its_share(self, replica: U, usable: Sequence[U], now_s: float) -> bool:
        """Whether a replica that has just come back already got its part of the requests sent since."""
        returned_s = replica.health.returned_s
        if now_s >= returned_s + SLOW_START_S:
            return False
        everyone = sum(other.sent for other in usable)
        if replica.return_counts is None or replica.return_counts[0] != returned_s:
            replica.return_counts = (returned_s, replica.sent, everyone)
        _, own_before, everyone_before = replica.return_counts
        return (replica.sent - own_before) * len(usable) > everyone - everyone_before
