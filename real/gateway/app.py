"""The endpoints of a gateway: OpenAI's for completions, and those that tell how it is."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web

from real.gateway.api_keys import ApiKeys
from real.gateway.client_connection import ClientConnection
from real.gateway.completion_request import parse_completion
from real.gateway.config import GatewayConfig
from real.gateway.error_events import Refusal, error_body
from real.gateway.forwarding import Forwarding, request_id_of
from real.gateway.metrics import Outcome

_Handler = Callable[[web.BaseRequest, ClientConnection, float], Awaitable[web.StreamResponse]]
_HEADERS = {"Server": "expert-router", "Content-Type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
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
        self._max_body_bytes = config.serve.limits.max_body_bytes
        self._started = int(time.time())
        self.draining = False
        self._routes: dict[str, tuple[str, _Handler]] = {
            COMPLETIONS: ("POST", self._ledgered),
            CHAT: ("POST", self._ledgered),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        connection = request.protocol
        assert isinstance(connection, ClientConnection)
        arrived_s = connection.begin()
        try:
            method, handler = self._routes.get(request.path, ("", None))
            if handler is None:
                raise Refusal("client_error", 404, "there is no such path here")
            if request.method != method:
                raise Refusal("client_error", 405, f"this path takes {method} only")
            return await handler(request, connection, arrived_s)
        except Refusal as refusal:
            return _refuse(refusal)
        finally:
            connection.end()

    async def _ledgered(
        self, request: web.BaseRequest, connection: ClientConnection, arrived_s: float
    ) -> web.StreamResponse:
        """Answer a completion request, and note what became of it, whatever that is."""
        outcome = Outcome(request_id_of(request.headers.get("x-request-id")), arrived_s)
        self._forwarding.begin()
        try:
            response = await self._completion(request, connection, outcome)
        except Refusal as refusal:
            outcome.outcome, outcome.status = refusal.outcome, refusal.status
            return _refuse(refusal, outcome.request_id)
        except (asyncio.CancelledError, ConnectionError):
            outcome.outcome = (
                "request_timeout" if connection.was_late else "slow_reader" if connection.was_slow else "cancelled"
            )
            raise
        except BaseException:
            outcome.outcome, outcome.status = "defect", 500
            raise
        finally:
            self._forwarding.end(outcome)
        return response

    async def _completion(
        self, request: web.BaseRequest, connection: ClientConnection, outcome: Outcome
    ) -> web.StreamResponse:
        if self.draining:
            raise Refusal("draining", 503, "this gateway is about to stop", retry_after_s=_DRAINING_RETRY_S)
        self._authorise(request)
        body = await self._body(request)
        connection.request_is_here()
        chat = request.path == CHAT
        return await self._forwarding.forward(request, parse_completion(body, chat=chat), outcome)

    def _authorise(self, request: web.BaseRequest) -> None:
        if not self._keys.accept(request.headers.get("Authorization")):
            raise Refusal("unauthorized", 401, "an API key is needed: Authorization: Bearer KEY")

    async def _body(self, request: web.BaseRequest) -> bytes:
        too_large = Refusal("client_error", 413, f"the body may have {self._max_body_bytes} bytes at most")
        if (request.content_length or 0) > self._max_body_bytes:
            raise too_large
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refusal("client_error", 415, "compressed bodies are not taken")
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise too_large from None
        except web.RequestPayloadError:
            raise Refusal("client_error", 400, "the body is malformed") from None

    async def _models(self, request: web.BaseRequest, *_: object) -> web.StreamResponse:
        self._authorise(request)
        names = (*(expert.name for expert in self._config.experts), *self._config.virtual_models)
        models = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "expert-router"} for name in names
        ]
        return _json(200, {"object": "list", "data": models})

    async def _health(self, request: web.BaseRequest, *_: object) -> web.StreamResponse:
        return _json(200, {"status": "ok"})

    async def _ready(self, request: web.BaseRequest, *_: object) -> web.StreamResponse:
        experts = self._forwarding.usable_replicas()
        ready = not self.draining and any(experts.values())
        return _json(200 if ready else 503, {"ready": ready, "draining": self.draining, "usable_replicas": experts})


def _json(status: int, body: object) -> web.Response:
    return web.Response(status=status, body=json.dumps(body).encode(), headers=_HEADERS)


def _refuse(refusal: Refusal, request_id: str | None = None) -> web.Response:
    response = web.Response(
        status=refusal.status,
        body=error_body(refusal.status, refusal.message, refusal.param),
        headers={**_HEADERS, **refusal.headers()},
    )
    if request_id is not None:
        response.headers["x-request-id"] = request_id
    if refusal.outcome in ("draining", "unauthorized") or refusal.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        response.force_close()
    return response
