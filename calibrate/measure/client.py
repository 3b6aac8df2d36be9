"""Sends the requests of a point to a server and notes what came back."""

import asyncio
import json
from itertools import count
from math import isnan

import numpy as np

from calibrate.measure.grid import Lengths, Point
from calibrate.measure.iteration_records import SentRequest
from real.users.load_client import Exchange, LoadClient, Patience
from real.users.prompts import PromptRequest, PromptWriter

PATIENCE = Patience(connect_s=10.0, first_token_s=600.0, idle_s=600.0, total_s=3600.0)
_NUMBERS_A_START = 10**6  # prompts of one start of an engine; more do not come together
PAUSE_S = 0.05
"""Mean pause of a closed-loop user before each request."""
_LOOK_S = 0.004
_SETTLE_S = 0.1


class RequestFailedError(RuntimeError):
    """A request of a point had no good answer; says which and why."""


class PointClient:
    """Sends points of prompts and outputs of fixed lengths to one server; prompts are text, as users send it."""

    def __init__(self, url: str, served_model: str, writer: PromptWriter, lengths: Lengths, seed: int):
        """Prepare inside a running event loop.

        Args:
            url: of the server.
            served_model: the name it answers to.
            writer: of prompts, for its tokenizer.
            lengths: of closed-loop users' requests.
            seed: of prompts and lengths; another one for each start of an engine, so that no prompt comes twice.
        """
        self._client = LoadClient(url, PATIENCE)
        self._served_model = served_model
        self._writer = writer
        self._prompts = count(_NUMBERS_A_START * seed)
        self._lengths = lengths
        self._rng = np.random.default_rng(seed)
        self._numbers = count()

    async def measure(self, point: Point, label: str) -> list[SentRequest]:
        """Send a point's requests, wait for the answers and for the engine to be idle again.

        Raises:
            RequestFailedError: an answer was not good.
        """
        self._numbers = count()
        self._label = label
        if point.kind == "closed":
            each = max(1, round(point.requests / point.users))
            rows = await asyncio.gather(*[self._user(each) for _ in range(point.users)])
            sent = [request for row in rows for request in row]
        elif point.kind == "idle":
            sent = [await self._ask(point.prompt_tokens, point.output_tokens) for _ in range(point.requests)]
        else:
            sent = await self._steps(point)
        await asyncio.sleep(_SETTLE_S)
        failed = next((request for request in sent if request.failure), None)
        if failed is not None:
            raise RequestFailedError(f"a request of {failed.prompt_tokens} prompt tokens failed: {failed.failure}")
        return sorted(sent, key=lambda request: request.number)

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    async def _steps(self, point: Point) -> list[SentRequest]:
        batch = [self._start(point.prompt_tokens, point.output_tokens) for _ in range(point.requests)]
        sent = []
        if point.late:
            while any(len(one.chunk_s) < 2 and not done.done() for one, done, _ in batch):
                await asyncio.sleep(_LOOK_S)
            sent = [await self._ask(point.late_tokens, 2) for _ in range(point.late)]
        return [*[await self._answer(*started) for started in batch], *sent]

    async def _user(self, requests: int) -> list[SentRequest]:
        sent = []
        for _ in range(requests):
            # Without a pause every request would come right after an iteration's end.
            await asyncio.sleep(float(self._rng.exponential(PAUSE_S)))
            which = self._rng.integers(len(self._lengths.prompts))
            sent.append(await self._ask(int(self._lengths.prompts[which]), int(self._lengths.outputs[which])))
        return sent

    async def _ask(self, prompt_tokens: int, output_tokens: int) -> SentRequest:
        return await self._answer(*self._start(prompt_tokens, output_tokens))

    def _start(self, prompt_tokens: int, output_tokens: int) -> tuple[Exchange, asyncio.Future[None], SentRequest]:
        asked = PromptRequest(prompt_tokens, next(self._prompts), int(self._rng.integers(2**31)))
        (prompt,) = self._writer.write([asked])
        body = json.dumps(
            {
                "model": self._served_model,
                "prompt": prompt.text,
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        number = next(self._numbers)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        exchange = self._client.send(body, f"{self._label}-{number}".replace(" ", "-"), lambda _: done.set_result(None))
        sent = SentRequest(
            point=self._label,
            number=number,
            prompt_tokens=prompt.tokens,
            output_tokens=output_tokens,
            sent_s=exchange.sent_s,
        )
        return exchange, done, sent

    async def _answer(self, exchange: Exchange, done: asyncio.Future[None], asked: SentRequest) -> SentRequest:
        await done
        failure = f"{exchange.failure} {exchange.detail}".strip()
        if not failure and isnan(exchange.first_token_s):
            failure = "no token came"
        return SentRequest(
            point=asked.point,
            number=asked.number,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            sent_s=exchange.sent_s,
            first_token_s=exchange.first_token_s,
            last_token_s=exchange.last_token_s,
            chunks=len(exchange.chunk_s),
            failure=failure,
        )
