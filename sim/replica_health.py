"""Whether a replica gets requests: what active checks and passing requests say about it, as a state machine.

In rotation -> out, when checks are missed, or a request finds the replica unreachable or silent, or 5xx or broken
answers come in a row. Out -> on trial, after a wait and good checks in a row: one request tries it. Its first good
byte brings the replica back, its failure doubles the wait. A 4xx is the client's mistake and never counts.

What a request tells is told with the epoch in which it was sent, and counts only while that lasts: an answer that began
before the replica went out says nothing about what came back. The clock is the caller's, so that nothing here waits:
the gateway's, or the simulator's.
"""

import math
from enum import Enum

from sim.serve_spec import HealthSpec

LONGEST_WAIT_S = 30.0
SERVER_ERRORS_IN_A_ROW = 5
SLOW_START_S = 1.0
"""How long a replica that came back gets no more than its share: it has nothing to do, and would draw everyone."""


class State(Enum):
    """Of a replica."""

    IN = "in rotation"
    OUT = "out"
    TRIAL = "on trial"


class ReplicaHealth:
    """The state of one replica.

    Attributes:
        state: where it stands.
        ejections: how often it left the rotation, which is also the number of the present epoch.
        returned_s: when it last came back, and from when on it starts slowly.
    """

    __slots__ = (
        "_bad_checks",
        "_good_checks",
        "_retry_at_s",
        "_server_errors",
        "_spec",
        "_trial_taken",
        "_wait_s",
        "ejections",
        "returned_s",
        "state",
    )

    def __init__(self, spec: HealthSpec) -> None:
        self._spec = spec
        self.state = State.OUT
        self.ejections = 0
        self.returned_s = -math.inf
        self._good_checks = 0
        self._bad_checks = 0
        self._server_errors = 0
        self._wait_s = spec.reopen_s
        self._retry_at_s = 0.0
        self._trial_taken = False

    def begin(self, ok: bool) -> None:
        """Take the first check, made before the gateway listens, for what the replica is."""
        self.state = State.IN if ok else State.OUT

    def checked(self, ok: bool, now_s: float) -> None:
        """Note the outcome of an active check."""
        if ok:
            self._good_checks += 1
            self._bad_checks = 0
            self._end_wait(now_s)
        else:
            self._good_checks = 0
            self._bad_checks += 1
            if self.state is State.TRIAL and not self._trial_taken:
                self.state = State.OUT
            elif self._bad_checks >= self._spec.unhealthy_after:
                self._fail(now_s)

    def _end_wait(self, now_s: float) -> None:
        if self.state is State.OUT and self._good_checks >= self._spec.healthy_after and now_s >= self._retry_at_s:
            self.state = State.TRIAL
            self._trial_taken = False

    @property
    def usable(self) -> bool:
        """Whether it makes sense to wait for a place there."""
        return self.state is not State.OUT

    @property
    def open(self) -> bool:
        """Whether it may get a request now."""
        return self.state is State.IN or (self.state is State.TRIAL and not self._trial_taken)

    def sent(self) -> int:
        """Note that a request goes there; return the epoch with which its outcome is to be told."""
        if self.state is State.TRIAL:
            self._trial_taken = True
        return self.ejections

    def answered(self, epoch: int, now_s: float) -> None:
        """Note a good first byte."""
        if epoch == self.ejections and self.state is State.TRIAL:
            self.state = State.IN
            self._wait_s = self._spec.reopen_s
            self._bad_checks = 0
            self.returned_s = now_s

    def completed(self, epoch: int) -> None:
        """Note an answer that came to a good end: what broke before was not one of many in a row."""
        if epoch == self.ejections:
            self._server_errors = 0

    def server_error(self, epoch: int, now_s: float) -> None:
        """Note an answer with 5xx, or one that broke off."""
        if epoch == self.ejections:
            self._server_errors += 1
            if self.state is State.TRIAL or self._server_errors >= SERVER_ERRORS_IN_A_ROW:
                self._fail(now_s)

    def failed(self, epoch: int, now_s: float) -> None:
        """Note a connection refused, or a silence that was too long."""
        if epoch == self.ejections:
            self._fail(now_s)

    def over(self, epoch: int) -> None:
        """Note a request's end; if it was on trial and told nothing (its client left, or a 4xx), another may try."""
        if epoch == self.ejections:
            self._trial_taken = False

    def _fail(self, now_s: float) -> None:
        if self.state is State.OUT:
            return
        if self.state is State.TRIAL:
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self.ejections += 1
        self.state = State.OUT
        self._good_checks = 0
        self._server_errors = 0
        self._retry_at_s = now_s + self._wait_s

    def retry_after_s(self, now_s: float) -> float:
        """Return how long it will be out at least."""
        return max(0.0, self._retry_at_s - now_s)
