"""From a parsed request to its answer: class, place, replica, at most one retry, and the bytes passed on."""

import asyncio
import json
import os
import re
import secrets
import time
from dataclasses import asdict
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from real.gateway.admission import Admission
from real.gateway.answer import Answer
from real.gateway.classification import Classification, ClassifierBusyError
from real.gateway.completion_request import CompletionRequest
from real.gateway.config import GatewayConfig, share_of
from real.gateway.error_events import Refusal
from real.gateway.metrics import GatewayMetrics, Outcome
from real.gateway.replicas import Place, Replica, Routing, Wish
from real.gateway.turns import Turns
from real.gateway.upstream import Exchange, Upstream, UpstreamError
from sim.spec import ALL_EXPERTS

CLASS_HEADER: Final = "x-expert-router-class"
_PASSED_ON: Final = ("accept", "traceparent", "tracestate")
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]{1,1024}")
_WORTH_A_RETRY: Final = frozenset((500, 502, 503, 504))

_FAILURES: Final[dict[str, tuple[int, str]]] = {
    "connect_failed": (503, "the expert cannot be reached"),
    "no_descriptor": (503, "this gateway has too many files open"),
    "reset": (502, "the expert broke off"),
    "first_byte_timeout": (504, "the expert did not answer in time"),
    "idle_timeout": (504, "the expert stopped answering"),
    "total_timeout": (504, "the answer took too long"),
    "no_done": (502, "the expert's stream ended before its end"),
    "drained": (503, "this gateway has stopped"),
}
"""What went wrong with an expert -> status and message."""


def request_id_of(given: str | None) -> str:
    """Return the client's request id if it can be passed on, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


class Forwarding:
    """Everything between a worker's clients and its replicas.

    Attributes:
        open: requests that have begun and not ended.
        admission: hands out places.
    """

    def __init__(
        self,
        config: GatewayConfig,
        worker: int,
        routing: Routing,
        classification: Classification | None,
        upstream: Upstream,
        metrics: GatewayMetrics,
    ) -> None:
        """Begin with nothing open; ``classification`` is None where no class decides."""
        self._config = config
        self._timeouts = config.serve.timeouts
        self._retry_share = config.serve.limits.retry_share
        self._routing = routing
        self._classification = classification
        self._upstream = upstream
        self._metrics = metrics
        self._class_index = {name: index for index, name in enumerate(config.classes)}
        self._virtual = frozenset(config.virtual_models)
        self._clock = asyncio.get_running_loop().time
        self._names = [expert.name for expert in config.experts]
        lines = [*self._names, ALL_EXPERTS]
        self.admission = Admission(
            routing,
            queue_bound=share_of(config.serve.limits.max_queued_per_expert, worker, config.router.workers),
            queue_s=min(self._timeouts.queue_s, self._timeouts.total_s),
            clock=self._clock,
            on_in_flight=lambda r: metrics.in_flight(self._names[r.expert], r.index, r.outstanding),
            on_queued=lambda line, depth: metrics.queue(lines[line], depth),
        )
        self._retrying = 0
        self._turns = Turns()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped = False
        self._log = (
            None
            if config.request_log is None
            else os.open(config.request_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        )
        self.open = 0

    # ------------------------------------------------------------------------------------------------ the ledger

    def begin(self) -> None:
        """Count a request in."""
        self.open += 1
        self._metrics.begin()

    def end(self, outcome: Outcome) -> None:
        """Count a request out; the one place where its outcome is written down."""
        self.open -= 1
        ended_s = time.monotonic()
        self._metrics.end(outcome, ended_s)
        if self._log is not None:
            os.write(self._log, json.dumps({**asdict(outcome), "ended_s": ended_s}).encode() + b"\n")

    def usable_replicas(self) -> dict[str, int]:
        """Return how many replicas of each expert could get a request."""
        pairs = zip(self._names, self._routing.by_expert, strict=True)
        return {name: sum(replica.health.usable for replica in replicas) for name, replicas in pairs}

    def stop(self) -> None:
        """Break off every request that is under way, as at the end of a drain."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------------------------------------------ one request

    async def forward(
        self, request: web.BaseRequest, completion: CompletionRequest, outcome: Outcome
    ) -> web.StreamResponse:
        """Answer a request by an expert's answer.

        Raises:
            Refusal: it gets none.
        """
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            deadline_s = self._clock() + self._timeouts.total_s - (time.monotonic() - outcome.arrived_s)
            wish = await self._wish(request, completion, outcome)
            return await self._answer(request, completion, outcome, wish, deadline_s)
        except asyncio.CancelledError:
            if self._stopped and request.transport is not None:
                task.uncancel()
                raise _refusal("drained") from None
            raise
        finally:
            self._tasks.discard(task)

    async def _wish(self, request: web.BaseRequest, completion: CompletionRequest, outcome: Outcome) -> Wish:
        """Where the request may go: by its model if that is an expert's, by its class if classes decide."""
        model = completion.model
        named = None
        if model is not None and model not in self._virtual:
            named = self._routing.of_expert(model)
            if named is None:
                raise Refusal("client_error", 404, f"the model {model!r} does not exist", param="model")
        given = request.headers.get(CLASS_HEADER)
        if given is not None:
            if given not in self._class_index:
                known = ", ".join(self._class_index)
                raise Refusal("client_error", 400, f"{CLASS_HEADER} must be one of {known}; got {given!r}")
            outcome.class_name = given
        elif self._classification is not None and named is None:
            if completion.text is None:
                message = f"a prompt of token ids cannot be classified; send text, an expert's model or {CLASS_HEADER}"
                raise Refusal("client_error", 400, message, param="prompt")
            began_s = time.perf_counter()
            try:
                index = await self._classification.classify(completion.text)
            except ClassifierBusyError:
                message = "too many prompts wait to be classified; try again later"
                raise Refusal("queue_full", 429, message, retry_after_s=1.0) from None
            outcome.classify_s = time.perf_counter() - began_s
            outcome.class_name = self._config.classes[index]
        elif not outcome.class_name and len(self._config.classes) == 1:
            outcome.class_name = self._config.classes[0]
        if named is not None:
            return named
        if not outcome.class_name:
            return self._routing.everyone
        return self._routing.of_class(self._class_index[outcome.class_name])

    async def _answer(
        self,
        request: web.BaseRequest,
        completion: CompletionRequest,
        outcome: Outcome,
        wish: Wish,
        deadline_s: float,
    ) -> web.StreamResponse:
        asked_s = time.monotonic()
        place = await self.admission.place(wish)
        outcome.queue_s = time.monotonic() - asked_s
        exchange: Exchange | None = None
        retrying = False
        try:
            try:
                exchange = await self._send(request, completion, outcome, place, deadline_s)
                other = self._another(wish, place.replica) if exchange.status in _WORTH_A_RETRY else None
            except UpstreamError as error:
                other = None if error.kind == "total_timeout" else self._another(wish, place.replica)
                if other is None:
                    raise
            if other is not None:
                if exchange is not None:
                    exchange.close()
                    exchange = None
                self.admission.release(place)
                place, retrying = other, True
                self._retrying += 1
                self._metrics.retries.inc()
                exchange = await self._send(request, completion, outcome, place, deadline_s)
            assert exchange is not None
            return await self._relay(request, outcome, exchange, place)
        except UpstreamError as error:
            raise _refusal(error.kind) from None
        finally:
            self._retrying -= retrying
            if exchange is not None:
                exchange.close()
            self.admission.release(place)

    def _another(self, wish: Wish, besides: Replica) -> Place | None:
        """A place for a second try, if the budget for these allows one more."""
        if self._retry_share == 0 or self._retrying >= max(1.0, self._retry_share * self.open):
            return None
        return self.admission.another(wish, besides)

    async def _send(
        self,
        request: web.BaseRequest,
        completion: CompletionRequest,
        outcome: Outcome,
        place: Place,
        deadline_s: float,
    ) -> Exchange:
        """Send the request to a replica, wait for its answer's first byte, and note what that says about it."""
        replica = place.replica
        expert = self._config.experts[replica.expert]
        outcome.expert, outcome.replica = expert.name, replica.index
        outcome.chosen_s = time.monotonic()
        outcome.tries += 1
        headers = {"content-type": "application/json", "x-request-id": outcome.request_id}
        for name in _PASSED_ON:
            value = request.headers.get(name)
            if value is not None and _HEADER_VALUE.fullmatch(value):
                headers[name] = value
        try:
            exchange = await self._upstream.send(
                replica, request.path, headers, completion.for_model(expert.served_model), deadline_s
            )
        except UpstreamError as error:
            await self._failed(place, error.kind, begun=False)
            raise
        if exchange.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            replica.health.server_error(place.epoch, self._clock())
        elif exchange.status < HTTPStatus.BAD_REQUEST:
            replica.health.answered(place.epoch, self._clock())
        return exchange

    async def _failed(self, place: Place, kind: str, *, begun: bool) -> None:
        """Take a replica out that cannot be reached or is silent; not one that is slow while it answers others.

        A broken answer counts like a 5xx: a few in a row are needed, because one request alone may be to blame. What
        follows for the request itself waits for its turn, an answer that has begun behind the others.
        """
        now_s = self._clock()
        health = place.replica.health
        silent = now_s - place.replica.heard_s > self._config.serve.health.interval_s
        if kind == "connect_failed" or (kind in ("first_byte_timeout", "idle_timeout") and silent):
            health.failed(place.epoch, now_s)
        elif kind in ("reset", "no_done"):
            health.server_error(place.epoch, now_s)
        self.admission.hand_out()
        await self._turns.mine(first=not begun)

    async def _relay(
        self, request: web.BaseRequest, outcome: Outcome, exchange: Exchange, place: Place
    ) -> web.StreamResponse:
        answer = Answer(request, _own_headers(outcome))
        response = await answer.start(exchange.status, exchange.headers, exchange.take())
        outcome.status = exchange.status
        outcome.ttft_s = time.monotonic() - outcome.arrived_s
        try:
            await self._pass_on(exchange, answer, place)
        except UpstreamError as error:
            outcome.outcome = error.kind
            answer.break_off(*_FAILURES[error.kind])
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopped or request.transport is None or task is None:
                raise
            task.uncancel()
            outcome.outcome = "drained"
            answer.break_off(*_FAILURES["drained"])
        else:
            events = answer.events
            if exchange.status >= HTTPStatus.INTERNAL_SERVER_ERROR or (events is not None and events.is_error):
                outcome.outcome = "expert_error"
            elif exchange.status >= HTTPStatus.BAD_REQUEST:
                outcome.outcome = "client_error"
            else:
                place.replica.health.completed(place.epoch)
        finally:
            if answer.events is not None:
                outcome.chunks = answer.events.chunks
        return response

    async def _pass_on(self, exchange: Exchange, answer: Answer, place: Place) -> None:
        """Pass the body on until its end.

        Raises:
            UpstreamError: it did not end well, and it is this request's turn to be told.
        """
        try:
            await exchange.relay(answer)
            answer.end_of_body()
            if answer.events is not None and exchange.status == HTTPStatus.OK and not answer.events.is_done:
                raise UpstreamError("no_done")
        except UpstreamError as error:
            await self._failed(place, error.kind, begun=True)
            raise


def _own_headers(outcome: Outcome) -> dict[str, str]:
    headers = {
        "Server": "expert-router",
        "x-request-id": outcome.request_id,
        "x-expert-router-expert": outcome.expert,
        "x-expert-router-replica": str(outcome.replica),
        "x-expert-router-received-s": f"{outcome.arrived_s:.6f}",
        "x-expert-router-classify-s": f"{outcome.classify_s or 0.0:.6f}",
        "x-expert-router-chosen-s": f"{outcome.chosen_s:.6f}",
        "x-expert-router-queue-s": f"{outcome.queue_s or 0.0:.6f}",
    }
    if outcome.class_name:
        headers[CLASS_HEADER] = outcome.class_name
    return headers


def _refusal(kind: str) -> Refusal:
    status, message = _FAILURES[kind]
    retry_after_s = 1.0 if status in (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE) else None
    return Refusal(kind, status, message, retry_after_s=retry_after_s)
