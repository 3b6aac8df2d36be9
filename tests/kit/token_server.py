"""A small OpenAI-compatible server that streams tokens at stated times: ground truth for what a client measures.

    python -m tests.kit.token_server PORT [SETTINGS as JSON]

prints ``ready`` when it listens. A prompt counts one token a word unless ``tokenizer`` names a tokenizer.json. Prompts
holding ``fail:KIND`` go wrong in that way (see ``_Answers``). GET /requests lists the bodies received, each with the
client's port and the monotonic time of each chunk sent.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import uvloop
from aiohttp import web

KEEP_BODIES = 10_000


@dataclass
class Settings:
    """Seconds until the first token and between tokens; the name served; a status to refuse everything with.

    ``routed`` answers with the headers of a gateway that takes every prompt for ``chat`` and has one expert, ``one``.
    """

    ttft_s: float = 0.05
    itl_s: float = 0.01
    model: str = "mock"
    tokenizer: str | None = None
    headers: dict[str, str] | None = None
    refuse: int = 0
    routed: bool = False


class _Answers:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.bodies: list[dict[str, Any]] = []
        self.running = 0
        self.served = 0
        self.cancelled = 0
        self.count: Callable[[str], int] = lambda text: len(text.split())
        if settings.tokenizer:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(settings.tokenizer)
            self.count = lambda text: len(tokenizer.encode(text).ids)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        received_s = monotonic()
        body = await request.json()
        if len(self.bodies) < KEEP_BODIES:
            assert request.transport is not None
            port = request.transport.get_extra_info("peername")[1]
            body |= {"x-request-id": request.headers.get("x-request-id"), "port": port, "chunk_s": []}
            self.bodies.append(body)
        prompt = body["prompt"]
        fail = str(self.settings.refuse or prompt.partition("fail:")[2].split(" ")[0])
        if fail in ("400", "404", "429", "503"):
            headers = {"Retry-After": "1"} if fail == "429" else {}
            return web.json_response({"error": {"message": "no", "code": int(fail)}}, status=int(fail), headers=headers)
        headers = {"Content-Type": "text/event-stream", "x-request-id": request.headers.get("x-request-id", "")}
        if self.settings.routed:
            place = {"class": "chat", "expert": "one", "replica": "0", "received-s": f"{received_s:.6f}"}
            place |= {"classify-s": "0", "queue-s": "0", "chosen-s": f"{monotonic():.6f}"}
            headers |= {f"x-expert-router-{name}": value for name, value in place.items()}
        response = web.StreamResponse(headers=headers | (self.settings.headers or {}))
        self.running += 1
        try:
            await self._stream(request, response, body, prompt, fail)
            self.served += 1
        except (ConnectionResetError, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, body: dict[str, Any], prompt: str, fail: str
    ) -> None:
        loop, settings = asyncio.get_running_loop(), self.settings
        due_s = loop.time() + settings.ttft_s
        response.enable_chunked_encoding()
        for number in range(body["max_tokens"]):
            await asyncio.sleep(due_s - loop.time())
            if not number and fail == "mute":
                await asyncio.sleep(3600)
            if not number:
                await response.prepare(request)
            body.get("chunk_s", []).append(monotonic())
            await response.write(_event({"choices": [{"index": 0, "text": " token", "finish_reason": None}]}))
            due_s += settings.itl_s
            if number == 2 and fail == "error":
                await response.write(_event({"error": {"message": "engine died", "code": 500}}) + b"data: [DONE]\n\n")
                return
            if number == 2 and fail == "cut":
                assert request.transport is not None
                request.transport.abort()
                return
            if number == 2 and fail == "silent":
                return
            if number == 2 and fail == "stall":
                await asyncio.sleep(3600)
        usage = {"prompt_tokens": self.count(prompt), "completion_tokens": body["max_tokens"]}
        await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.settings.model}]})

    async def requests(self, request: web.Request) -> web.Response:
        return web.json_response(self.bodies)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.mock"})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        labels = f'{{engine="0",model_name="{self.settings.model}"}}'
        values = {
            "vllm:num_requests_running": self.running,
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0.25,
            "vllm:num_preemptions_total": 0,
            "vllm:iteration_tokens_total_count": 10 * self.served,
            "vllm:iteration_tokens_total_sum": 10 * self.served,
            "vllm:request_queue_time_seconds_sum": 0.5 * self.served,
            "vllm:request_queue_time_seconds_count": self.served,
        }
        return web.Response(text="".join(f"{name}{labels} {value}\n" for name, value in values.items()))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _serve(port: int, settings: Settings) -> None:
    answers = _Answers(settings)
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/completions", answers.complete)
    app.router.add_get("/v1/models", answers.models)
    app.router.add_get("/requests", answers.requests)
    app.router.add_get("/version", answers.version)
    app.router.add_get("/metrics", answers.metrics)
    app.router.add_get("/health", answers.health)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), Settings(**json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))))
