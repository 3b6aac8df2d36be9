"""A stand-in for one vLLM server, as a real process: ``python -m tests.kit.mock_expert --port P --model NAME``.

It speaks vLLM's wire format (completions and chat, streamed or not, usage chunk, ``[DONE]``, ``/health``) and makes up
the words. Times are either paced (a time to first token, a time between tokens) or those of an engine with continuous
batching and a known service curve. Faults are switched by ``POST /mock/behave`` for all that follows, or by a field
``mock`` in one request's body. ``GET /mock/state`` counts; ``--log`` gets a line at each request's start and end.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import httptools
import uvloop

from real.gateway.listener import Listener

_WORDS = [f" word{index}" for index in range(97)]
CREATED = 1_700_000_000


@dataclass(frozen=True)
class Behaviour:
    """How answers are given."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    status: int | None = None  # answer with this error, after ttft_s
    health: int = 200
    hang_before_head: bool = False
    hang_after: int | None = None  # chunks, then silence
    cut_after: int | None = None  # chunks, then the connection is reset
    end_after: int | None = None  # chunks, then a clean end without [DONE]
    error_after: int | None = None  # chunks, then an error event and [DONE]
    die_after: int | None = None  # chunks, then the process is gone
    late_head: bool = False  # with the first token instead of at once, as vLLM does
    pad: int = 0  # more characters a token
    pieces: int | None = None  # body bytes are written in pieces of so many
    redirect: str | None = None
    raw_stream: str | None = None  # body of a stream instead of made-up tokens, latin-1

    def changed(self, given: dict[str, Any]) -> "Behaviour":
        known = {field.name for field in fields(Behaviour)}
        assert set(given) <= known, given
        return replace(self, **given)


@dataclass(frozen=True)
class Curve:
    """Seconds of one iteration: ``base_s + per_seq_s * decodes + per_prefill_token_s * prompt tokens``."""

    base_s: float
    per_seq_s: float
    per_prefill_token_s: float
    max_num_seqs: int


class Engine(Protocol):
    def add(self, answer: "StreamedAnswer") -> None: ...


class PacedEngine:
    """Every request on its own, at the pace that it asks for: from its own arrival, in whole milliseconds.

    The loop's timers know no less than a millisecond, so those who are due in the same one share a timer.
    """

    def __init__(self) -> None:
        self.due: dict[int, list[tuple[StreamedAnswer, float]]] = {}

    def add(self, answer: "StreamedAnswer") -> None:
        behaviour = answer.behaviour
        if behaviour.itl_s == 0 and behaviour.ttft_s == 0:
            answer.all_at_once()
        else:
            self._at(answer, asyncio.get_running_loop().time() + behaviour.ttft_s)

    def _at(self, answer: "StreamedAnswer", due_s: float) -> None:
        tick = round(due_s * 1000)
        if tick not in self.due:
            self.due[tick] = []
            asyncio.get_running_loop().call_at(tick / 1000, self._step, tick)
        self.due[tick].append((answer, due_s))

    def _step(self, tick: int) -> None:
        for answer, due_s in self.due.pop(tick):
            if not answer.over:
                answer.token()
            if not answer.over:
                self._at(answer, due_s + answer.behaviour.itl_s)


class BatchingEngine:
    """Continuous batching: whole prompts are admitted while slots last, every iteration gives each one token."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self.waiting: list[StreamedAnswer] = []
        self.running: list[StreamedAnswer] = []
        self.stepping = False

    def add(self, answer: "StreamedAnswer") -> None:
        self.waiting.append(answer)
        if not self.stepping:
            self.stepping = True
            self._begin_step(asyncio.get_running_loop().time())

    def _begin_step(self, now_s: float) -> None:
        curve = self.curve
        self.running = [answer for answer in self.running if not answer.over]
        self.waiting = [answer for answer in self.waiting if not answer.over]
        decodes, prefill = len(self.running), 0
        while self.waiting and len(self.running) < curve.max_num_seqs:
            answer = self.waiting.pop(0)
            prefill += answer.prompt_tokens
            self.running.append(answer)
        if not self.running:
            self.stepping = False
            return
        end_s = now_s + curve.base_s + curve.per_seq_s * decodes + curve.per_prefill_token_s * prefill
        asyncio.get_running_loop().call_at(end_s, self._end_step, end_s)

    def _end_step(self, end_s: float) -> None:
        for answer in self.running:
            if not answer.over:
                answer.token()
        self._begin_step(end_s)


class StreamedAnswer:
    """The answer to one completion request; not streamed, its tokens are written together at the end."""

    def __init__(self, expert: "MockExpert", connection: "Connection", path: str, body: dict[str, Any]) -> None:
        self.expert = expert
        self.connection = connection
        self.behaviour = expert.behaviour.changed(body.get("mock", {}))
        self.chat = path.endswith("chat/completions")
        self.stream = bool(body.get("stream"))
        self.usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        prompt = body.get("prompt") if not self.chat else json.dumps(body.get("messages"))
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        self.seed = len(text)
        self.prompt_tokens = expert.count(text)
        self.request_id = connection.headers.get("x-request-id", "none")
        self.model = body.get("model") or expert.model
        self.sent = 0
        self.over = False
        self.head_sent = False
        behaviour = self.behaviour
        faults = (
            behaviour.hang_after,
            behaviour.cut_after,
            behaviour.end_after,
            behaviour.die_after,
            behaviour.error_after,
        )
        self.faults = frozenset(faults) - {None}
        self.before, self.after = b"", b""
        if self.stream:
            text = json.dumps({**self.frame(), "choices": [self.choice(2, "\0")]})
            before, _, after = text.partition("\\u0000")
            self.before, self.after = f"data: {before}".encode(), f"{after}\n\n".encode()

    def begin(self) -> None:
        expert, behaviour = self.expert, self.behaviour
        expert.prompts += 1
        expert.running.add(self)
        expert.log("start", self)
        if behaviour.hang_before_head:
            return
        if behaviour.redirect is not None:
            self.connection.respond(307, b"", {"location": behaviour.redirect})
            self.end("failed")
            return
        if behaviour.status is not None:
            if behaviour.ttft_s:
                self.timer = asyncio.get_running_loop().call_later(behaviour.ttft_s, self.refuse)
            else:
                self.refuse()
            return
        if self.stream and not behaviour.late_head:
            self.head()
        if behaviour.raw_stream is not None:
            self.head()
            self.write(behaviour.raw_stream.encode("latin-1"))
            self.connection.end_chunks()
            self.end("completed")
            return
        expert.engine.add(self)

    def refuse(self) -> None:
        assert self.behaviour.status is not None
        self.connection.respond(self.behaviour.status, error_body(self.behaviour.status, "made to fail"))
        self.end("failed")

    def head(self) -> None:
        if not self.head_sent:
            self.head_sent = True
            self.connection.begin_chunks({"content-type": "text/event-stream; charset=utf-8", "x-mock": "yes"})

    def all_at_once(self) -> None:
        """Write tokens until the buffer is full, and again when it has emptied."""
        while not self.over and not self.connection.paused:
            self.token()
        if not self.over:
            self.connection.on_resume = self.all_at_once

    def token(self) -> None:
        """Write one token, or do what is to be done instead of the next one."""
        if self.sent in self.faults:
            self._fault(self.behaviour)
            return
        self.sent += 1
        if self.stream:
            self.head()
            if self.sent in (1, self.tokens):
                self.write(b"data: " + json.dumps(self.chunk()).encode() + b"\n\n")
            else:
                self.write(self.before + self.word(self.sent - 1).encode() + self.after)
        if self.sent == self.tokens:
            self._finish()

    def _fault(self, behaviour: Behaviour) -> None:
        self.over = True
        if self.sent == behaviour.die_after:
            os._exit(1)
        if self.sent == behaviour.cut_after:
            self.connection.abort()
            self.end("failed")
        elif self.sent == behaviour.end_after:
            self.connection.end_chunks()
            self.end("failed")
        elif self.sent == behaviour.error_after:
            self.write(b"data: " + error_body(500, "made to fail") + b"\n\ndata: [DONE]\n\n")
            self.connection.end_chunks()
            self.end("failed")

    def _finish(self) -> None:
        self.end("completed")  # logged before the client can have it all: a kill may come in between
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "completion_tokens": self.tokens,
        }
        if self.stream:
            if self.usage:
                self.write(b"data: " + json.dumps({**self.frame(), "choices": [], "usage": usage}).encode() + b"\n\n")
            self.write(b"data: [DONE]\n\n")
            self.connection.end_chunks()
        else:
            text = "".join(self.word(index) for index in range(self.tokens))
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
            choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            body = {**self.frame(), "choices": [choice], "usage": usage}
            self.connection.respond(200, json.dumps(body).encode())

    def frame(self) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if self.stream else "chat.completion") if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_id}"
        return {"id": name, "object": kind, "created": CREATED, "model": self.model}

    def word(self, index: int) -> str:
        return _WORDS[(self.seed + index) % len(_WORDS)] + "x" * self.behaviour.pad

    def chunk(self) -> dict[str, Any]:
        reason = "length" if self.sent == self.tokens else None
        return {**self.frame(), "choices": [self.choice(self.sent, self.word(self.sent - 1), reason)]}

    def choice(self, number: int, text: str, reason: str | None = None) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"delta": {"role": "assistant", "content": text} if number == 1 else {"content": text}}
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def write(self, data: bytes) -> None:
        size = self.behaviour.pieces
        if size is None:
            self.connection.chunk(data)
        else:
            for start in range(0, len(data), size):
                self.connection.chunk(data[start : start + size])
        self.expert.chunks += 1

    def end(self, outcome: str) -> None:
        self.over = True
        if self in self.expert.running:
            self.expert.running.discard(self)
            self.expert.ended[outcome] = self.expert.ended.get(outcome, 0) + 1
            self.expert.log(outcome, self)
        if self.connection.answer is self:
            self.connection.answer = None


class MockExpert:
    """What all connections share."""

    def __init__(self, model: str, engine: Engine, behaviour: Behaviour, log: str | None) -> None:
        self.model = model
        self.engine = engine
        self.behaviour = behaviour
        self.prompts = 0
        self.chunks = 0
        self.requests = 0
        self.running: set[StreamedAnswer] = set()
        self.running_max = 0
        self.ended: dict[str, int] = {}
        self.last_headers: dict[str, str] = {}
        self.connections = 0
        self.count: Callable[[str], int] = lambda text: len(text.split())  # tokens of a prompt
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def log(self, what: str, answer: StreamedAnswer) -> None:
        self.running_max = max(self.running_max, len(self.running))
        if self._log is not None:
            line = {"what": what, "id": answer.request_id, "chunks": answer.sent, "s": time.monotonic()}
            os.write(self._log, json.dumps(line).encode() + b"\n")

    def state(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "requests": self.requests,
            "chunks": self.chunks,
            "running": len(self.running),
            "running_max": self.running_max,
            "ended": self.ended,
            "last_headers": self.last_headers,
            "connections": self.connections,
        }


def error_body(status: int, message: str) -> bytes:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


class Connection(asyncio.Protocol):
    """One connection from a gateway or client."""

    transport: asyncio.Transport

    def __init__(self, expert: MockExpert) -> None:
        self.expert = expert
        self.parser = httptools.HttpRequestParser(self)
        self.answer: StreamedAnswer | None = None
        self.paused = False
        self.on_resume: Any = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.url = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self.expert.connections += 1

    def connection_lost(self, exc: BaseException | None) -> None:
        self.expert.connections -= 1
        if self.answer is not None:
            self.answer.end("cancelled")

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        again, self.on_resume = self.on_resume, None
        if again is not None:
            again()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    # what httptools calls

    def on_message_begin(self) -> None:
        self.headers, self.body, self.url = {}, b"", b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        path, expert = self.url.decode(), self.expert
        if path == "/health":
            self.respond(expert.behaviour.health, b"")
        elif path == "/mock/state":
            self.respond(200, json.dumps(expert.state()).encode())
        elif path == "/mock/behave":
            expert.behaviour = Behaviour().changed(json.loads(self.body))
            self.respond(200, b"{}")
        elif path == "/v1/models":
            self.respond(200, json.dumps({"object": "list", "data": [{"id": expert.model}]}).encode())
        elif path in ("/v1/completions", "/v1/chat/completions"):
            expert.requests += 1
            expert.last_headers = self.headers
            self._complete(path)
        else:
            expert.requests += 1
            self.respond(404, error_body(404, "no such path"))

    def _complete(self, path: str) -> None:
        try:
            body = json.loads(self.body)
        except ValueError:
            self.respond(400, error_body(400, "not JSON"))
            return
        max_tokens = body.get("max_tokens")
        if max_tokens is not None and (not isinstance(max_tokens, int) or not 1 <= max_tokens <= 10**7):
            self.respond(400, error_body(400, "max_tokens must be at least 1"))
            return
        self.answer = StreamedAnswer(self.expert, self, path, body)
        self.answer.begin()

    # answers

    def respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        lines = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        self.transport.write(_head(status, lines) + body)

    def begin_chunks(self, headers: dict[str, str]) -> None:
        self.transport.write(_head(200, {**headers, "transfer-encoding": "chunked"}))

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_chunks(self) -> None:
        self.transport.write(b"0\r\n\r\n")

    def abort(self) -> None:
        self.transport.abort()


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\nserver: uvicorn\r\n{lines}\r\n".encode()


async def serve(port: int, expert: MockExpert) -> None:
    listener = Listener("127.0.0.1", port, lambda: Connection(expert))
    print("ready", flush=True)
    await asyncio.Event().wait()
    listener.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="mock")
    parser.add_argument("--behaviour", default="{}", help="JSON")
    parser.add_argument("--curve", help="JSON: base_s, per_seq_s, per_prefill_token_s, max_num_seqs")
    parser.add_argument("--log")
    arguments = parser.parse_args()
    curve = arguments.curve
    engine: Engine = PacedEngine() if curve is None else BatchingEngine(Curve(**json.loads(curve)))
    behaviour = Behaviour().changed(json.loads(arguments.behaviour))
    sys.setswitchinterval(0.01)
    uvloop.run(serve(arguments.port, MockExpert(arguments.model, engine, behaviour, arguments.log)))


if __name__ == "__main__":
    main()
