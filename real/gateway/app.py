"""The endpoints of a gateway: OpenAI's for completions, and those that tell how it is."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from real.gateway.answer import answer_whole
from real.gateway.api_keys import ApiKeys
from real.gateway.client_connection import ClientConnection
from real.gateway.completion_request import parse_completion
from real.gateway.config import GatewayConfig
from real.gateway.error_events import Refusal, error_body
from real.gateway.forwarding import Forwarding
from real.gateway.ledger import request_id_of
from real.gateway.metrics import Outcome
from real.gateway.request_parser import Request, too_large

_Handler = Callable[[Request, ClientConnection], Awaitable[None]]
COMPLETIONS, CHAT = b"/v1/completions", b"/v1/chat/completions"
_DRAINING_RETRY_S = 1.0


class GatewayApp:
    """Answers each request of one worker.

    Attributes:
        draining: whether only what is under way gets answered.
    """

    def __init__(self, config: GatewayConfig, keys: ApiKeys, forwarding: Forwarding) -> None:
        self._config = config
        self._keys = keys
        self._forwarding = forwarding
        self._ledger = forwarding.ledger
        self._most_body_bytes = config.serve.limits.max_body_bytes
        self._started = int(time.time())
        self.draining = False
        self._routes: dict[bytes, tuple[bytes, _Handler]] = {
            COMPLETIONS: (b"POST", self._ledgered),
            CHAT: (b"POST", self._ledgered),
            b"/v1/models": (b"GET", self._models),
            b"/health": (b"GET", self._health),
            b"/ready": (b"GET", self._ready),
        }

    async def handle(self, request: Request, connection: ClientConnection) -> None:
        """Answer one request."""
        try:
            method, handler = self._routes.get(request.path, (b"", None))
            if handler is None:
                raise Refusal("client_error", 404, "there is no such path here")
            if request.method != method:
                raise Refusal("client_error", 405, f"this path takes {method.decode()} only")
            await handler(request, connection)
        except Refusal as refusal:
            refuse(connection, request, refusal)

    async def _ledgered(self, request: Request, connection: ClientConnection) -> None:
        """Answer a completion request, and note what became of it, whatever that is."""
        outcome = Outcome(request_id_of(request.header(b"x-request-id")), request.arrived_s)
        self._ledger.begin()
        try:
            await self._completion(request, connection, outcome)
        except Refusal as refusal:
            outcome.outcome, outcome.status = refusal.outcome, refusal.status
            refuse(connection, request, refusal, outcome.request_id)
        except asyncio.CancelledError:
            outcome.outcome = (
                "request_timeout" if connection.was_late else "slow_reader" if connection.was_slow else "cancelled"
            )
            raise
        except BaseException:
            outcome.outcome, outcome.status = "defect", 500
            raise
        finally:
            self._ledger.end(outcome)

    async def _completion(self, request: Request, connection: ClientConnection, outcome: Outcome) -> None:
        if self.draining:
            raise Refusal("draining", 503, "this gateway is about to stop", retry_after_s=_DRAINING_RETRY_S)
        self._authorise(request)
        if request.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal("client_error", 415, "compressed bodies are not taken")
        if not request.is_here:
            await self._arrive(request, connection)
        completion = parse_completion(request.body, chat=request.path == CHAT)
        await self._forwarding.forward(request, connection, completion, outcome)

    def _authorise(self, request: Request) -> None:
        if not self._keys.accept(request.headers.get(b"authorization")):
            raise Refusal("unauthorized", 401, "an API key is needed: Authorization: Bearer KEY")

    async def _arrive(self, request: Request, connection: ClientConnection) -> None:
        if request.promised_bytes > self._most_body_bytes:
            raise too_large(self._most_body_bytes)
        if request.asks_first:
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await request.arrive()

    async def _models(self, request: Request, connection: ClientConnection) -> None:
        self._authorise(request)
        names = (*(expert.name for expert in self._config.experts), *self._config.virtual_models)
        models = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "expert-router"} for name in names
        ]
        _answer_json(connection, request, 200, {"object": "list", "data": models})

    async def _health(self, request: Request, connection: ClientConnection) -> None:
        _answer_json(connection, request, 200, {"status": "ok"})

    async def _ready(self, request: Request, connection: ClientConnection) -> None:
        experts = self._forwarding.usable_replicas()
        ready = not self.draining and any(experts.values())
        body = {"ready": ready, "draining": self.draining, "usable_replicas": experts}
        _answer_json(connection, request, 200 if ready else 503, body)


def _answer_json(connection: ClientConnection, request: Request, status: int, body: object) -> None:
    answer_whole(connection, request, status, json.dumps(body).encode(), {})


def refuse(
    connection: ClientConnection, request: Request | None, refusal: Refusal, request_id: str | None = None
) -> None:
    """Send a refusal as an answer; None for what could not be read as a request."""
    headers = refusal.headers()
    if request_id is not None:
        headers["x-request-id"] = request_id
    if refusal.outcome in ("draining", "unauthorized") or refusal.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        connection.stays_open = False
    body = error_body(refusal.status, refusal.message, refusal.param)
    answer_whole(connection, request, refusal.status, body, headers)
