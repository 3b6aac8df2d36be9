"""A request on its way through the fleet."""

from math import nan
from typing import NamedTuple, Protocol

from sim.engine import EngineRequest


class Destination(Protocol):
    """The replica a request was sent to, as far as its record and the router need it."""

    expert_index: int
    replica_index: int
    outstanding: int


class Failure(NamedTuple):
    """What a failed request's user got.

    Attributes:
        http_status: of the answer; 200 of one that broke off after it had begun.
        pause_s: how long the user waits at least before sending again.
    """

    http_status: int
    pause_s: float = 0.0


class Request(EngineRequest):
    """A request with the times that become its record (``sim.records``)."""

    __slots__ = (
        "class_index",
        "engine_arrival_s",
        "failure",
        "first_run",
        "first_token_engine_s",
        "first_token_s",
        "front_end_start_s",
        "gaps",
        "last_run",
        "last_token_engine_s",
        "last_token_s",
        "paused_s",
        "prefix",
        "queued_since_s",
        "replica",
        "request_id",
        "resumes_after_s",
        "routed_class_index",
        "router_end_s",
        "router_start_s",
        "scheduled_s",
        "sent_s",
        "spans",
        "user_id",
    )

    def __init__(self, request_id: int, user_id: int, class_index: int, prompt_tokens: int, output_tokens: int):
        super().__init__(prompt_tokens, output_tokens)
        self.request_id = request_id
        self.user_id = user_id
        self.class_index = class_index
        self.routed_class_index = class_index
        self.prefix: tuple[int, int] | None = None  # (number, shared tokens) of its own; None: what its class shares
        self.replica: Destination | None = None
        self.failure: Failure | None = None
        self.sent_s = nan
        self.router_start_s = nan
        self.router_end_s = nan
        self.front_end_start_s = nan
        self.engine_arrival_s = nan
        self.scheduled_s = nan
        self.first_token_engine_s = nan
        self.first_token_s = nan
        self.last_token_engine_s = nan
        self.last_token_s = nan
        # Tokens after the first one come one per iteration of the runs first_run + 1 .. last_run of its replica.
        self.first_run = -1
        self.last_run = -1
        # Preempted only: the spans of runs before, the gaps across each preemption, and since when it waits.
        self.spans: list[tuple[int, int]] | None = None
        self.gaps: list[float] | None = None
        self.resumes_after_s = nan
        self.queued_since_s = nan  # in the engine's waiting queue, this time
        self.paused_s = 0.0  # preempted and waiting, in all

    def start_over(self) -> None:
        """Forget all that a replica did with it: that replica is dead, and another one begins anew."""
        super().__init__(self.prompt_tokens, self.output_tokens)
        self.front_end_start_s = self.engine_arrival_s = self.scheduled_s = nan
        self.first_token_engine_s = self.first_token_s = nan
        self.first_run = -1
        self.spans = self.gaps = None
        self.resumes_after_s = self.queued_since_s = nan
        self.paused_s = 0.0
