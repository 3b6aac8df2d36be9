"""From a parsed request to its answer: class, place, replica, at most one retry, and the bytes passed on."""

import asyncio
import re
import time
from typing import Final

from real.gateway.admission import Admission
from real.gateway.answer import Answer
from real.gateway.classification import Classification
from real.gateway.client_connection import ClientConnection
from real.gateway.completion_request import CompletionRequest
from real.gateway.config import GatewayConfig, share_of
from real.gateway.error_events import Refusal
from real.gateway.exchange import Exchange, UpstreamError
from real.gateway.ledger import Ledger
from real.gateway.metrics import GatewayMetrics, Outcome
from real.gateway.replicas import Place, Replica, Routing
from real.gateway.request_parser import Request
from real.gateway.turns import Turns
from real.gateway.upstream import Upstream
from real.gateway.wishes import CLASS_HEADER, Wishes
from sim.spec import ALL_EXPERTS
from sim.usable_replicas import Wish

_CLASS_HEADER: Final = CLASS_HEADER.encode()
_PASSED_ON: Final = (b"accept", b"traceparent", b"tracestate")
_HEADER_VALUE: Final = re.compile(rb"[\x20-\x7e]{1,1024}")
_OK, _CLIENT_ERROR, _SERVER_ERROR = 200, 400, 500
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


class Forwarding:
    """Everything between a worker's clients and its replicas.

    Attributes:
        ledger: the account of all requests.
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
        self._wishes = Wishes(config, routing, classification)
        self._upstream = upstream
        self._metrics = metrics
        self._clock = asyncio.get_running_loop().time
        self._names = [expert.name for expert in config.experts]
        lines = [*self._names, ALL_EXPERTS]
        self.admission = Admission(
            routing,
            queue_bound=share_of(config.serve.limits.max_queued_per_expert, worker, config.router.workers),
            queue_s=min(self._timeouts.queue_s, self._timeouts.total_s),
            clock=self._clock,
            on_in_flight=lambda r: metrics.in_flight(self._names[r.expert], str(r.index), r.outstanding),
            on_queued=lambda line, depth: metrics.queue(lines[line], depth),
        )
        self._retrying = 0
        self._turns = Turns()
        self._clients: set[ClientConnection] = set()
        self._stopped = False
        self.ledger = Ledger(metrics, config.request_log)

    def usable_replicas(self) -> dict[str, int]:
        """Return how many replicas of each expert could get a request."""
        pairs = zip(self._names, self._routing.by_expert, strict=True)
        return {name: sum(replica.health.usable for replica in replicas) for name, replicas in pairs}

    def stop(self) -> None:
        """Break off every request that is under way, as at the end of a drain."""
        self._stopped = True
        for connection in self._clients:
            connection.cancel()

    # ------------------------------------------------------------------------------------------------ one request

    async def forward(
        self, request: Request, connection: ClientConnection, completion: CompletionRequest, outcome: Outcome
    ) -> None:
        """Answer a request by an expert's answer.

        Raises:
            Refusal: it gets none.
        """
        self._clients.add(connection)
        try:
            deadline_s = self._clock() + self._timeouts.total_s - (time.monotonic() - outcome.arrived_s)
            wish = await self._wishes.of(completion, request.header(_CLASS_HEADER), outcome)
            await self._answer(request, connection, completion, outcome, wish, deadline_s)
        except asyncio.CancelledError:
            if self._survives(connection):
                raise _refusal("drained") from None
            raise
        finally:
            self._clients.discard(connection)

    def _survives(self, connection: ClientConnection) -> bool:
        """Whether a request that is being cancelled can still be answered: it is, when it was ``stop`` that did it."""
        task = asyncio.current_task()
        if not self._stopped or connection.transport.is_closing() or task is None:
            return False
        task.uncancel()
        return True

    async def _answer(
        self,
        request: Request,
        connection: ClientConnection,
        completion: CompletionRequest,
        outcome: Outcome,
        wish: Wish,
        deadline_s: float,
    ) -> None:
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
                self._metrics.retry()
                exchange = await self._send(request, completion, outcome, place, deadline_s)
            assert exchange is not None
            await self._relay(Answer(connection, request), outcome, exchange, place)
        except UpstreamError as error:
            raise _refusal(error.kind) from None
        finally:
            self._retrying -= retrying
            if exchange is not None:
                exchange.close()
            self.admission.release(place)

    def _another(self, wish: Wish, besides: Replica) -> Place | None:
        """A place for a second try, if the budget for these allows one more."""
        if self._retry_share == 0 or self._retrying >= max(1.0, self._retry_share * self.ledger.open):
            return None
        return self.admission.another(wish, besides)

    async def _send(
        self,
        request: Request,
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
        headers = f"content-type: application/json\r\nx-request-id: {outcome.request_id}\r\n".encode()
        for name in _PASSED_ON:
            if name in request.headers and _HEADER_VALUE.fullmatch(request.headers[name]):
                headers += b"%b: %b\r\n" % (name, request.headers[name])
        try:
            exchange = await self._upstream.send(
                replica, request.path, headers, completion.for_model(expert.served_model), deadline_s
            )
        except UpstreamError as error:
            await self._failed(place, error.kind, begun=False)
            raise
        if exchange.status >= _SERVER_ERROR:
            replica.health.server_error(place.epoch, self._clock())
        elif exchange.status < _CLIENT_ERROR:
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

    async def _relay(self, answer: Answer, outcome: Outcome, exchange: Exchange, place: Place) -> None:
        first, whole = exchange.take(), exchange.is_done
        answer.start(exchange.status, _own_headers(outcome), exchange.headers, first, whole=whole)
        outcome.status = exchange.status
        outcome.ttft_s = time.monotonic() - outcome.arrived_s
        try:
            await self._pass_on(exchange, answer, place)
        except UpstreamError as error:
            outcome.outcome = error.kind
            answer.break_off(*_FAILURES[error.kind])
        except asyncio.CancelledError:
            if not self._survives(answer.connection):
                raise
            outcome.outcome = "drained"
            answer.break_off(*_FAILURES["drained"])
        else:
            answer.end()
            events = answer.events
            if exchange.status >= _SERVER_ERROR or (events is not None and events.is_error):
                outcome.outcome = "expert_error"
            elif exchange.status >= _CLIENT_ERROR:
                outcome.outcome = "client_error"
            else:
                place.replica.health.completed(place.epoch)
        finally:
            if answer.events is not None:
                outcome.chunks = answer.events.chunks

    async def _pass_on(self, exchange: Exchange, answer: Answer, place: Place) -> None:
        """Pass the body on until its end.

        Raises:
            UpstreamError: it did not end well, and it is this request's turn to be told.
        """
        try:
            await exchange.relay(answer)
            answer.add_last(exchange.take())
            if answer.events is not None and exchange.status == _OK and not answer.events.is_done:
                raise UpstreamError("no_done")
        except UpstreamError as error:
            await self._failed(place, error.kind, begun=True)
            raise


def _own_headers(outcome: Outcome) -> str:
    lines = (
        f"x-request-id: {outcome.request_id}\r\n"
        f"x-expert-router-expert: {outcome.expert}\r\n"
        f"x-expert-router-replica: {outcome.replica}\r\n"
        f"x-expert-router-received-s: {outcome.arrived_s:.6f}\r\n"
        f"x-expert-router-classify-s: {outcome.classify_s or 0.0:.6f}\r\n"
        f"x-expert-router-chosen-s: {outcome.chosen_s:.6f}\r\n"
        f"x-expert-router-queue-s: {outcome.queue_s or 0.0:.6f}\r\n"
    )
    return f"{lines}{CLASS_HEADER}: {outcome.class_name}\r\n" if outcome.class_name else lines


def _refusal(kind: str) -> Refusal:
    status, message = _FAILURES[kind]
    retry_after_s = 1.0 if status in (502, 503) else None
    return Refusal(kind, status, message, retry_after_s=retry_after_s)
