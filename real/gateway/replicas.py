"""The replicas behind a gateway, and the choice among them that it shares with the simulator."""

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from real.gateway.config import GatewayConfig, GatewayExpert, share_of
from real.gateway.error_events import Refusal
from sim.policies import Uniform
from sim.replica_health import ReplicaHealth
from sim.usable_replicas import NobodyUpError, UsableReplicas, Wish


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
        self.cap: float = cap
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


def _saturated_at(expert: GatewayExpert, worker: int, workers: int) -> float:
    """Mean requests per replica from which an expert is saturated for one worker: its share, but one at the least."""
    replicas = len(expert.replica_urls)
    return max(1, share_of(math.ceil(expert.saturated_at * replicas), worker, workers)) / replicas


class Routing(UsableReplicas[Replica]):
    """The policy of one fleet, applied to the replicas that can be used at the moment."""

    def __init__(self, config: GatewayConfig, worker: int, uniform: Uniform) -> None:
        spec, limits = config.router, config.serve.limits
        cap = share_of(limits.max_in_flight_per_replica, worker, spec.workers)
        super().__init__(
            spec,
            [
                [
                    Replica(expert, index, url, cap, ReplicaHealth(config.serve.health))
                    for index, url in enumerate(config.experts[expert].replica_urls)
                ]
                for expert in range(len(config.experts))
            ],
            uniform,
            # Outstanding requests are this worker's only, so it spills over at its share of the bound.
            [_saturated_at(expert, worker, spec.workers) for expert in config.experts],
        )
        self.replicas = [replica for replicas in self.by_expert for replica in replicas]
        order = {expert.name: index for index, expert in enumerate(config.experts)}
        self._by_class = [
            Wish(tuple(order[name] for name in config.class_map[class_name]), anywhere=not config.routes_by_class)
            for class_name in config.classes
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

        Raises:
            Refusal: nothing can be used.
        """
        try:
            return super().choose(wish, now_s, besides)
        except NobodyUpError:
            message = "no replica that could answer is up; try again shortly"
            raise Refusal("no_replica", 503, message, retry_after_s=self.retry_after_s(wish, now_s)) from None

    def send_to(self, replica: Replica) -> Place:
        """Count a request that goes to this replica."""
        return Place(replica, self.count_sent(replica))
