"""What every run, simulated or real, checks about itself. A failed check is a defect of this program, and raises."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.records import COMPLETED, FAILED, IN_FLIGHT, STATUSES
from sim.replica import Replica

TOLERANCE = 1e-6  # relative, for sums of floating-point times


class SelfCheckError(RuntimeError):
    """A run breaks a law that holds for every queueing system; its figures cannot be trusted."""


@dataclass(slots=True)
class Occupancy:
    """How many are somewhere, integrated over time: the left side of Little's law, counted event by event."""

    count: int = 0
    _area_s: float = 0.0
    _as_of_s: float = 0.0

    def change(self, now_s: float, by: int) -> None:
        """Let the count change now."""
        self._area_s += self.count * (now_s - self._as_of_s)
        self._as_of_s = now_s
        self.count += by

    def area_until(self, now_s: float) -> float:
        """Return the integral of the count from the beginning until now."""
        return self._area_s + self.count * (now_s - self._as_of_s)


@dataclass(slots=True)
class Counted:
    """What a run counts event by event, apart from its request records.

    Attributes:
        sent: requests that entered the system, at the router's door.
        ended: requests that completed or failed.
        in_system: requests between entering and leaving the router's door.
        at_router: requests waiting for or served by a router worker.
    """

    sent: int = 0
    ended: int = 0
    in_system: Occupancy = field(default_factory=Occupancy)
    at_router: Occupancy = field(default_factory=Occupancy)


def check_run(
    counted: Counted,
    requests: dict[str, NDArray[Any]],
    replicas: Sequence[Replica],
    end_s: float,
    user_network_s: float,
    has_router: bool,
) -> dict[str, str]:
    """Check a finished run; return what each check found.

    Conservation: every request sent has one outcome. Order: no timestamp lies before the one it follows. Little's law
    (the integral of the number in a station equals the sum of the times spent there) for the whole system, the router
    and every engine, the left side counted by events and the right side from the request records. KV blocks: taken and
    free ones add up.

    Raises:
        SelfCheckError: one of them fails.
    """
    found = check_requests(counted, requests, end_s, requests["last_token_s"], user_network_s)
    if has_router:
        found["little, router"] = _little(
            "the router",
            counted.at_router.area_until(end_s),
            requests["sent_s"] + user_network_s,
            requests["router_end_s"],
            end_s,
        )
    spent = 0.0
    for replica in replicas:
        spent += _engine(replica)
    found["little, engines"] = f"{spent:,.1f} request seconds"
    return found


def check_requests(
    counted: Counted,
    requests: dict[str, NDArray[Any]],
    end_s: float,
    left_s: NDArray[np.float64],
    user_network_s: float = 0.0,
) -> dict[str, str]:
    """Check what needs no look inside the fleet: conservation, order, and Little's law for the whole system.

    Args:
        counted: events as they were counted.
        requests: columns of ``REQUEST_COLUMNS``.
        end_s: when the run ended.
        left_s: when each request's user was through with it; NaN for one in flight.
        user_network_s: one-way delay between users and the door where events are counted.

    Raises:
        SelfCheckError: one of them fails.
    """
    return {
        "conservation": _conservation(counted, requests),
        "order": _order(requests),
        "little, system": _little(
            "the system",
            counted.in_system.area_until(end_s),
            requests["sent_s"] + user_network_s,
            left_s - user_network_s,
            end_s,
        ),
    }


def _fail(what: str) -> None:
    raise SelfCheckError(f"self-check failed, please report this as a defect of Expert Router: {what}")


def _conservation(counted: Counted, requests: dict[str, NDArray[Any]]) -> str:
    counts = np.bincount(requests["status"], minlength=len(STATUSES))
    if len(np.unique(requests["request_id"])) != len(requests["request_id"]):
        _fail("a request is recorded twice")
    # Those on their way from the user to the router are sent, and in flight, but not yet counted at its door.
    on_the_way = counts.sum() - counted.sent
    recorded = ", ".join(f"{count:,} {status}" for status, count in zip(STATUSES, counts, strict=True))
    if not 0 <= on_the_way <= counts[IN_FLIGHT] or counts[COMPLETED] + counts[FAILED] != counted.ended:
        _fail(f"{counted.sent:,} requests entered and {counted.ended:,} ended, but recorded are {recorded}")
    return recorded


_ORDER = (
    "sent_s",
    "router_start_s",
    "router_end_s",
    "front_end_start_s",
    "engine_arrival_s",
    "scheduled_s",
    "first_token_engine_s",
    "first_token_s",
    "last_token_s",
)


def _order(requests: dict[str, NDArray[Any]]) -> str:
    latest = np.array(requests["sent_s"], np.float64)
    for name in _ORDER[1:]:
        column = np.asarray(requests[name], np.float64)
        if np.any(column < latest - TOLERANCE):
            _fail(f"{name} of request {requests['request_id'][np.argmax(column < latest - TOLERANCE)]} lies too early")
        latest = np.fmax(latest, column)
    return f"{len(latest):,} requests"


def _little(where: str, area_s: float, enter_s: NDArray[np.float64], leave_s: NDArray[np.float64], end_s: float) -> str:
    entered = enter_s <= end_s
    spent_s = float((np.fmin(leave_s, end_s) - enter_s)[entered].sum())
    if abs(area_s - spent_s) > TOLERANCE * max(1.0, spent_s):
        _fail(f"Little's law in {where}: {area_s} request seconds by count, {spent_s} by request")
    return f"{area_s:,.1f} request seconds"


def _engine(replica: Replica) -> float:
    spent_s = replica.time_in_engine_s()
    name = f"replica {replica.replica_index} of {replica.expert.name}"
    area_s = replica.scheduled_area_s()
    if abs(area_s - spent_s) > TOLERANCE * max(1.0, spent_s):
        _fail(f"Little's law in {name}: {area_s} request seconds by iteration, {spent_s} by request")
    kv = replica.engine.kv
    if not 0 <= kv.free <= kv.num_blocks or (not replica.engine.running and kv.free != kv.num_blocks):
        _fail(f"KV blocks of {name}: {kv.free} of {kv.num_blocks} free, {len(replica.engine.running)} requests running")
    return spent_s
