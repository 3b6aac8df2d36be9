"""What the router does when replicas die: health checks, second tries and refusals, as the real gateway does them.

Health and choice are the gateway's own code (``sim.replica_health``, ``sim.usable_replicas``). A request whose answer
has begun fails when its replica dies. One that waits for its first token is tried once more on another replica, if
there is one and the budget for second tries allows, and else refused. While no replica is up requests are refused;
while the only one is on trial they wait. The router's workers share what they know here; the gateway's do not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import floor, inf
from typing import TYPE_CHECKING

from simpy import Environment
from simpy.events import Event, Timeout

from sim.fleet import Fleet
from sim.records import COMPLETED
from sim.replica_health import ReplicaHealth, State
from sim.request import Failure, Request
from sim.streams import stream
from sim.usable_replicas import NobodyUpError, UsableReplicas, Wish
from sim.users import PAUSE_AFTER_FAILURE_S

if TYPE_CHECKING:
    from sim.replica import Replica

BROKE_OFF = 200
"""HTTP status of an answer that had begun."""
RESET, UNREACHABLE = 502, 503
"""HTTP status when a replica died before the first token, and when it could not be reached, and no other was tried."""
NO_REPLICA = 503


class WatchedReplica:
    """A replica as the router sees it; fulfils ``sim.usable_replicas.UsableReplica``."""

    __slots__ = ("cap", "checking", "health", "replica", "return_counts", "sent")

    def __init__(self, replica: "Replica", health: ReplicaHealth):
        self.replica = replica
        self.health = health
        self.cap = inf
        self.sent = 0
        self.return_counts: tuple[float, int, int] | None = None
        self.checking = False

    @property
    def outstanding(self) -> int:
        """Unanswered requests."""
        return self.replica.outstanding

    @outstanding.setter
    def outstanding(self, count: int) -> None:
        self.replica.outstanding = count


class Failover:
    """The part of a simulation in which replicas die.

    Attributes:
        second_tries: how many requests were tried once more.
    """

    def __init__(
        self,
        env: Environment,
        fleet: Fleet,
        by_expert: Sequence[Sequence["Replica"]],
        seed: int,
        *,
        forward: Callable[[Request], None],
        fail: Callable[[Request], None],
        in_router: Callable[[], int],
    ):
        """Kill replicas when it is time.

        Args:
            env: the simulation's clock.
            fleet: with its outages.
            by_expert: the replicas.
            seed: of the replication.
            forward: sends a request to its replica.
            fail: ends a request whose ``failure`` is set; its user is told now.
            in_router: tells how many requests the router has, those at replicas included.
        """
        spec = fleet.router
        assert spec is not None, "check_feasible lets no outage through without a router"
        self._env = env
        self._network_s = spec.expert_network_s
        self._user_network_s = spec.user_network_s
        self._health = fleet.health
        self._retry_share = fleet.limits.retry_share
        self._forward, self._fail, self._in_router = forward, fail, in_router
        self._watched = {
            replica: WatchedReplica(replica, ReplicaHealth(fleet.health))
            for replicas in by_expert
            for replica in replicas
        }
        for each in self._watched.values():
            each.health.begin(True)
        saturated_at = [spec.spill_over_outstanding or expert.engine.max_num_seqs for expert in fleet.experts]
        self._usable: UsableReplicas[WatchedReplica] = UsableReplicas(
            spec,
            [[self._watched[replica] for replica in replicas] for replicas in by_expert],
            stream(seed, "policy").random,
            saturated_at,
        )
        if spec.policy in ("class", "class_with_spill_over"):
            self._wishes = [Wish(experts) for experts in fleet.class_map]
        else:
            self._wishes = [Wish(tuple(range(len(by_expert))), anywhere=True)] * len(fleet.class_map)
        self._places: dict[Request, tuple[WatchedReplica, int]] = {}
        self._trying_again: set[Request] = set()
        self._queue: list[Request] = []
        self.second_tries = 0
        for outage in fleet.outages:
            replica = by_expert[outage.expert_index][outage.replica_index]
            self._at(outage.at_s, partial(self._kill, replica, outage.for_s))

    # ------------------------------------------------------------------------------------------ a request's way

    def take(self, request: Request) -> None:
        """Send a request that is classified to a replica, let it wait for one, or refuse it."""
        wish = self._wishes[request.routed_class_index]
        if any(self._wishes[other.routed_class_index] == wish for other in self._queue):
            self._queue.append(request)
            return
        self._choose(request, wish, self._queue.append)

    def _choose(self, request: Request, wish: Wish, wait: Callable[[Request], None]) -> None:
        now_s = self._env.now
        try:
            watched = self._usable.choose(wish, now_s)
        except NobodyUpError:
            self._refuse(request, NO_REPLICA, self._usable.retry_after_s(wish, now_s))
            return
        if watched is None:
            wait(request)
        else:
            self._send(request, watched)

    def _send(self, request: Request, watched: WatchedReplica) -> None:
        request.replica = watched.replica
        self._places[request] = watched, self._usable.count_sent(watched)
        if watched.health.state is State.TRIAL:
            watched.replica.on_trial = request
        self._forward(request)

    def reaches(self, request: Request) -> bool:
        """Whether a request finds its replica up; if not, its fate is decided here."""
        watched, epoch = self._places[request]
        if watched.replica.is_up:
            return True
        watched.health.failed(epoch, self._env.now)
        self._hand_out()
        self._try_again(request, UNREACHABLE)
        return False

    def trial_answered(self, request: Request) -> None:
        """Note that the router has the first token of a request that was on trial."""
        place = self._places.get(request)
        if place is not None:
            place[0].health.answered(place[1], self._env.now)
            self._hand_out()

    def ended(self, request: Request, status: int) -> None:
        """Note that the router is through with a request; the count of unanswered ones is down already."""
        self._trying_again.discard(request)
        place = self._places.pop(request, None)
        if place is None:
            return
        watched, epoch = place
        if status == COMPLETED:
            watched.health.completed(epoch)
        watched.health.over(epoch)
        self._hand_out()

    def _try_again(self, request: Request, http_status: int) -> None:
        watched, _ = self._places[request]
        budget = max(1.0, self._retry_share * self._in_router())
        other = None
        if self._retry_share and request not in self._trying_again and len(self._trying_again) < budget:
            try:
                other = self._usable.choose(self._wishes[request.routed_class_index], self._env.now, watched)
            except NobodyUpError:
                other = None
        request.start_over()
        if other is None:
            self._refuse(request, http_status, 1.0)
            return
        watched.outstanding -= 1
        self.ended(request, http_status)
        self._trying_again.add(request)
        self.second_tries += 1
        self._send(request, other)

    def _refuse(self, request: Request, http_status: int, retry_after_s: float) -> None:
        request.failure = Failure(http_status, max(PAUSE_AFTER_FAILURE_S, retry_after_s))
        self._fail(request)

    def _hand_out(self) -> None:
        """Let those who wait go where a replica has come back, or away where none is left; in order of arrival."""
        if not self._queue:
            return
        waiting, self._queue = self._queue, []
        full: set[Wish] = set()
        for request in waiting:
            wish = self._wishes[request.routed_class_index]
            if wish in full:
                self._queue.append(request)
            else:
                before = len(self._queue)
                self._choose(request, wish, self._queue.append)
                if len(self._queue) > before:
                    full.add(wish)

    # ---------------------------------------------------------------------------------------- a replica's death

    def _kill(self, replica: "Replica", for_s: float, event: Event) -> None:
        now_s = self._env.now
        lost = replica.kill()
        noticed_s = now_s + self._network_s
        # Tokens that have left the replica by now still come.
        begun = {request for request in lost if request.first_token_s - self._user_network_s <= noticed_s}
        self._at(noticed_s, lambda event: self._on_broken(lost, begun))
        if for_s < inf:
            self._at(now_s + for_s, partial(self._come_up, replica))
        watched = self._watched[replica]
        if not watched.checking:
            watched.checking = True
            self._check_later(watched, floor(now_s / self._health.interval_s) + 1)

    def _come_up(self, replica: "Replica", event: Event) -> None:
        replica.is_up = True

    def _on_broken(self, lost: Sequence[Request], begun: set[Request]) -> None:
        now_s = self._env.now
        for request in lost:
            watched, epoch = self._places[request]
            watched.health.server_error(epoch, now_s)
        self._hand_out()
        for request in lost:
            if request in begun:
                request.failure = Failure(BROKE_OFF, PAUSE_AFTER_FAILURE_S)
                self._fail(request)
            else:
                self._try_again(request, RESET)

    def _check_later(self, watched: WatchedReplica, number: int) -> None:
        """Look at a replica when this health check is due: at whole multiples of the interval."""
        self._at(number * self._health.interval_s, lambda event: self._check(watched, number))

    def _check(self, watched: WatchedReplica, number: int) -> None:
        watched.health.checked(watched.replica.is_up, self._env.now)
        self._hand_out()
        if watched.replica.is_up and watched.health.state is State.IN:
            watched.checking = False  # from here on every check would say the same
        else:
            self._check_later(watched, number + 1)

    def _at(self, time_s: float, callback: Callable[[Event], None]) -> None:
        Timeout(self._env, max(0.0, time_s - self._env.now)).callbacks.append(callback)


def failures_text(counts: Counter[int]) -> str:
    """Say how many requests failed in which way, by ``http_status`` of the records."""
    parts = []
    for status, count in sorted(counts.items()):
        what = {BROKE_OFF: "whose answer broke off", 0: "without an answer"}.get(status, f"with HTTP {status}")
        parts.append(f"{count:,} {what}")
    return f"{counts.total():,} requests failed" + (f" ({', '.join(parts)})" if parts else "")
