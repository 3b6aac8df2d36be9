"""Keeps a fleet's processes running: starts them, restarts what dies, and stops all of them, whatever happens."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from real.experts.expert_server import START_LIMIT_S, STOP_GRACE_S, EngineFailedError

RESTARTS = 5
"""A process that died more often than this within ``WINDOW_S`` stays down."""

WINDOW_S = 600.0

FIRST_WAIT_S = 1.0
"""Before the first restart; doubles with each further one within the window, up to ``LONGEST_WAIT_S``."""

LONGEST_WAIT_S = 30.0

GATEWAY_END_S = 7.0
"""Longer than its drain that the gateway may take to end: it tells open streams, and ends its workers after 5 s."""

_TICK_S = 0.2

Tell = Callable[[str], None]
"""Told in one line what happens."""

State = Literal["new", "starting", "ready", "waiting", "given up", "stopped"]


class Service(Protocol):
    """A process that can be watched: an expert's replica, or the gateway."""

    @property
    def name(self) -> str:
        """As messages call it."""

    @property
    def started_s(self) -> float | None:
        """Monotonic time of the latest start; None before."""

    @property
    def log(self) -> Path:
        """Its log file."""

    @property
    def pid(self) -> int | None:
        """Its process group; None before the first start."""

    @property
    def is_running(self) -> bool:
        """Whether its process is there, ready or not."""

    def start(self) -> None:
        """Start without waiting; raises EngineFailedError."""

    def is_ready(self) -> bool:
        """Whether it serves; raises EngineFailedError when it has ended."""

    def stage(self) -> str:
        """How far the start is, in a few words."""

    def terminate(self) -> None:
        """Ask it to end, without waiting."""

    def stop(self, grace_s: float) -> None:
        """End it and all it started."""


@dataclass(slots=True)
class Watched:
    """A service and what became of it.

    Attributes:
        restarts: how often it has been started again.
        reason: why it ended last; empty before.
    """

    service: Service
    state: State = "new"
    restarts: int = 0
    reason: str = ""
    died_s: list[float] = field(default_factory=list)
    start_again_s: float = 0.0


class Supervisor:
    """Starts services, restarts those that die, stops all.

    ``start`` returns when all are ready and watches from then on in a thread of its own; so does each of its halves,
    ``start_experts`` and ``start_gateway``. What cannot even start the first time is an error, not a reason to try
    again.
    """

    def __init__(
        self,
        experts: Sequence[Service],
        gateway: Service | None = None,
        *,
        tell: Tell | None = None,
        changed: Callable[[], None] | None = None,
        starts_at_a_time: int = 1,
        drain_s: float = 30.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            experts: started first, stopped last.
            gateway: in front of them, or None.
            tell: told what happens, from several threads.
            changed: called after each change of state.
            starts_at_a_time: starting an engine keeps a core busy for half a minute.
            drain_s: for the gateway to finish what is in flight when stopped.
        """
        self.experts = [Watched(service) for service in experts]
        self.gateway = None if gateway is None else Watched(gateway)
        self._tell = tell or (lambda line: None)
        self._changed = changed or (lambda: None)
        self._starts_at_a_time = starts_at_a_time
        self._drain_s = drain_s
        self._ending = threading.Event()
        self._failed = threading.Event()
        self._thread: threading.Thread | None = None
        self._in_view: list[Watched] = []  # those that have been ready

    @property
    def watched(self) -> list[Watched]:
        """All of them, the gateway last."""
        return self.experts + ([] if self.gateway is None else [self.gateway])

    @property
    def failure(self) -> str | None:
        """Why the fleet cannot go on: the gateway, or every replica of all experts, has been given up."""
        if not self._failed.is_set():
            return None
        down = [each.service.name for each in self.watched if each.state == "given up"]
        return f"{', '.join(down)} could not be kept running"

    def start(self, limit_s: float = START_LIMIT_S) -> None:
        """Start everything and wait until it is ready; then watch it.

        Raises:
            EngineFailedError: something could not be started; everything is stopped then.
        """
        self.start_experts(limit_s)
        self.start_gateway(limit_s)

    def start_experts(self, limit_s: float = START_LIMIT_S) -> None:
        """Start the experts and wait until they are ready; then watch them.

        Raises:
            EngineFailedError: one could not be started; all are stopped then.
        """
        try:
            self._start_all(self.experts, limit_s)
        except BaseException:
            self.stop(drain_s=0)
            raise
        self._in_view = list(self.experts)
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def start_gateway(self, limit_s: float = START_LIMIT_S) -> None:
        """Start the gateway, if there is one, and wait until it is ready; then watch it as well.

        Raises:
            EngineFailedError: it could not be started; everything is stopped then.
        """
        if self.gateway is None:
            return
        try:
            self._start_all([self.gateway], limit_s)
        except BaseException:
            # The gateway may have users from the moment it is ready, which is before this has returned.
            self.stop(drain_s=None if self.gateway.state == "ready" else 0)
            raise
        self._in_view = self.watched

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the fleet has failed; False after ``timeout_s``. Signals are taken in between."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._failed.wait(_TICK_S):
            if end is not None and time.monotonic() > end:
                return False
        return True

    def stop(self, *, drain_s: float | None = None) -> None:
        """Stop everything: the gateway drains first, then the experts end. May be called again."""
        self._ending.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self.gateway is not None:
            self.gateway.service.stop(self._drain_s + GATEWAY_END_S if drain_s is None else drain_s)
            self.gateway.state = "stopped"
        for each in self.experts:
            each.service.terminate()
        end = time.monotonic() + STOP_GRACE_S
        for each in self.experts:
            each.service.stop(max(0.0, end - time.monotonic()))
            each.state = "stopped"
        self._changed()

    # ----------------------------------------------------------------------------------------------------- starting

    def _start_all(self, group: Sequence[Watched], limit_s: float) -> None:
        waiting = list(group)
        starting: list[Watched] = []
        stages: dict[str, str] = {}
        while waiting or starting:
            while waiting and len(starting) < self._starts_at_a_time:
                each = waiting.pop(0)
                self._start(each)
                starting.append(each)
            for each in list(starting):
                service = each.service
                if service.is_ready():
                    starting.remove(each)
                    self._ready(each, "ready")
                    continue
                self._check_limit(each, limit_s)
                now = service.stage()
                if now and stages.get(service.name) != now:
                    self._tell(f"{service.name}: {now}")
                stages[service.name] = now
            time.sleep(_TICK_S)

    def _start(self, each: Watched) -> None:
        each.service.start()
        each.state = "starting"
        self._changed()

    def _ready(self, each: Watched, word: str) -> None:
        assert each.service.started_s is not None
        each.state = "ready"
        self._tell(f"{each.service.name}: {word} after {time.monotonic() - each.service.started_s:.0f} s")
        self._changed()

    def _check_limit(self, each: Watched, limit_s: float) -> None:
        service = each.service
        assert service.started_s is not None
        if time.monotonic() - service.started_s > limit_s:
            stage = service.stage() or "starting"
            service.stop(0)
            raise EngineFailedError(f"{service.name}: no answer after {limit_s:g} s ({stage}); log: {service.log}")

    # ----------------------------------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        while not self._ending.wait(_TICK_S):
            for each in self._in_view:
                try:
                    self._look_at(each)
                except EngineFailedError as error:
                    self._died(each, str(error))
                except OSError as error:  # a full disk, for one: the next look tries again
                    self._died(each, f"{each.service.name}: {error}")

    def _look_at(self, each: Watched) -> None:
        if each.state == "ready" and not each.service.is_running:
            each.service.is_ready()  # says why it ended
        elif each.state == "waiting" and time.monotonic() >= each.start_again_s:
            each.restarts += 1
            self._start(each)
        elif each.state == "starting":
            if each.service.is_ready():
                self._ready(each, "serves again")
            else:
                self._check_limit(each, START_LIMIT_S)

    def _died(self, each: Watched, reason: str) -> None:
        now = time.monotonic()
        each.reason = reason
        each.died_s = [at for at in each.died_s if at > now - WINDOW_S] + [now]
        times = len(each.died_s)
        if times > RESTARTS:
            each.state = "given up"
            self._tell(f"{reason}. It died {times} times in {WINDOW_S / 60:g} minutes and stays down")
            if each is self.gateway or all(other.state == "given up" for other in self.experts):
                self._failed.set()
        else:
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (times - 1))
            each.state = "waiting"
            each.start_again_s = now + wait_s
            self._tell(f"{reason}. Starting it again in {wait_s:g} s ({times} of at most {RESTARTS})")
        self._changed()
