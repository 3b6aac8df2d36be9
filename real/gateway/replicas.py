"""The replicas behind a gateway and the choice among them: the simulator's policies over those that can be used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from real.gateway.config import GatewayConfig, GatewayExpert, share_of
from real.gateway.error_events import Refusal
from real.gateway.replica_health import SLOW_START_S, ReplicaHealth
from sim.policies import REPLICA_POLICIES, Pool, Uniform, by_class, by_class_with_spill_over


class Replica:
    """One replica as a worker of the gateway sees it.

    Attributes:
        expert: index into the fleet's experts.
        index: within the expert.
        outstanding: requests of this worker sent there and not yet answered; what policies look at.
        cap: how many of those this worker allows itself.
        heard_s: when it last sent a byte of any answer.
        sent: requests sent there so far.
        return_counts: when it last came back, and what it and all together had been sent by then.
    """

    __slots__ = (
        "address",
        "cap",
        "expert",
        "health",
        "heard_s",
        "host",
        "index",
        "outstanding",
        "port",
        "return_counts",
        "sent",
    )

    def __init__(self, expert: int, index: int, url: str, cap: int, health: ReplicaHealth) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.expert = expert
        self.index = index
        self.address = parts.netloc
        self.host = parts.hostname
        self.port = parts.port
        self.cap = cap
        self.health = health
        self.outstanding = 0
        self.heard_s = 0.0
        self.sent = 0
        self.return_counts: tuple[float, int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One place among the requests in flight at a replica.

    Attributes:
        replica: that one.
        epoch: of the replica's health when the place was taken; what becomes of the request is told with it.
    """

    replica: Replica
    epoch: int


@dataclass(frozen=True, slots=True)
class Wish:
    """Where a request may go.

    Attributes:
        experts: indices, the preferred one first.
        anywhere: whether the replica policy chooses among all of them at once.
    """

    experts: tuple[int, ...]
    anywhere: bool = False


def _saturated_at(expert: GatewayExpert, worker: int, workers: int) -> float:
    """Mean requests per replica from which an expert is saturated for one worker: its share, but one at the least."""
    replicas = len(expert.replica_urls)
    return max(1, share_of(math.ceil(expert.saturated_at * replicas), worker, workers)) / replicas


class Routing:
    """The policy of one fleet, applied to the replicas that can be used at the moment."""

    def __init__(self, config: GatewayConfig, worker: int, uniform: Uniform) -> None:
        spec, limits = config.router, config.serve.limits
        cap = share_of(limits.max_in_flight_per_replica, worker, spec.workers)
        self.by_expert: list[list[Replica]] = [
            [
                Replica(expert, index, url, cap, ReplicaHealth(config.serve.health))
                for index, url in enumerate(config.experts[expert].replica_urls)
            ]
            for expert in range(len(config.experts))
        ]
        self.replicas = [replica for replicas in self.by_expert for replica in replicas]
        self._uniform = uniform
        self._pools: list[Pool[Replica]] = [Pool(()) for _ in config.experts]
        self._everywhere: Pool[Replica] = Pool(())
        self._spills = spec.policy == "class_with_spill_over"
        # Outstanding requests are this worker's only, so it spills over at its share of the bound.
        self._saturated_at = [_saturated_at(expert, worker, spec.workers) for expert in config.experts]
        blind = not config.routes_by_class
        self._among = REPLICA_POLICIES[spec.policy if blind else spec.replica_policy]
        order = {expert.name: index for index, expert in enumerate(config.experts)}
        self._by_class = [
            Wish(tuple(order[name] for name in config.class_map[class_name]), blind) for class_name in config.classes
        ]
        self._named = {name: Wish((index,)) for name, index in order.items()}
        self.everyone = Wish(tuple(order.values()), anywhere=True)

    def of_class(self, class_index: int) -> Wish:
        """Return where prompts of this class go."""
        return self._by_class[class_index]

    def of_expert(self, name: str) -> Wish | None:
        """Return the wish for one expert; None when there is none of this name."""
        return self._named.get(name)

    def choose(self, wish: Wish, now_s: float, besides: Replica | None = None) -> Replica | None:
        """Return a replica with a free place, chosen by the policy; None when all that can be used are full.

        Args:
            wish: where the request may go.
            now_s: the time.
            besides: a replica that has already failed the request.

        Raises:
            Refusal: nothing can be used.
        """
        pools = self._pools
        experts = []
        for expert in wish.experts:
            usable = [r for r in self.by_expert[expert] if r.health.usable and r is not besides]
            if usable:
                pools[expert].replicas = usable
                experts.append(expert)
        if not experts:
            raise self._refusal(wish, now_s)
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

    def send_to(self, replica: Replica) -> Place:
        """Count a request that goes to this replica."""
        replica.outstanding += 1
        replica.sent += 1
        return Place(replica, replica.health.sent())

    def _has_its_share(self, replica: Replica, usable: Sequence[Replica], now_s: float) -> bool:
        """Whether a replica that has just come back already got its part of the requests sent since."""
        returned_s = replica.health.returned_s
        if now_s >= returned_s + SLOW_START_S:
            return False
        everyone = sum(other.sent for other in usable)
        if replica.return_counts is None or replica.return_counts[0] != returned_s:
            replica.return_counts = (returned_s, replica.sent, everyone)
        _, own_before, everyone_before = replica.return_counts
        return (replica.sent - own_before) * len(usable) > everyone - everyone_before

    def _refusal(self, wish: Wish, now_s: float) -> Refusal:
        waits_s = [r.health.retry_after_s(now_s) for expert in wish.experts for r in self.by_expert[expert]]
        message = "no replica that could answer is up; try again shortly"
        return Refusal("no_replica", 503, message, retry_after_s=max(1.0, min(waits_s)))
