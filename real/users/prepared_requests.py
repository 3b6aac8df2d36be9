"""The requests of a run in order, each with the body to send, made before they are due."""

import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from real.users.prompts import PromptRequest, PromptWriter
from sim.request import Request
from sim.traffic import ClosedLoopTraffic, OpenTraffic, TraceTraffic
from sim.users import ClosedLoopUsers, arriving_requests

MADE_BEFORE_THE_START = 5000
BATCH = 256


class PreparedRequest(NamedTuple):
    """A request that can be sent at once.

    Attributes:
        request: as ``simulate`` would send it.
        think_s: closed loop: seconds between the answer before and this request, or until its user starts.
        prompt_tokens: in the prompt by the tokenizer; the request's own number unless that could not be hit.
        body: JSON of ``POST /v1/completions``.
    """

    request: Request
    think_s: float
    prompt_tokens: int
    body: bytes


def closed_loop_requests(traffic: ClosedLoopTraffic, users: int) -> Iterator[tuple[Request, float]]:
    """Yield every user's first request, every user's second, and so on: request ``k * users + user``, without end."""
    of_users = ClosedLoopUsers(traffic, users)
    while True:
        for user in range(users):
            yield of_users.next_request(user)


def open_requests(traffic: OpenTraffic | TraceTraffic) -> Iterator[tuple[Request, float]]:
    """Yield requests in order of arrival."""
    for request in arriving_requests(traffic):
        yield request, 0.0


def prompt_request(request: Request, *, seed: int, first_number: int) -> PromptRequest:
    """Return what a request's prompt must be.

    Args:
        request: of a run.
        seed: of the choice of texts.
        first_number: of the run's prompts, so that no two runs send the same ones.
    """
    text = zlib.crc32(b"%d/%d" % (seed, request.request_id))
    return PromptRequest(request.prompt_tokens, first_number + request.request_id, text, request.prefix)


class PreparedRequests:
    """Hands requests out by their number and stays ahead of them."""

    def __init__(
        self,
        source: Iterator[tuple[Request, float]],
        writers: Sequence[PromptWriter],
        *,
        model: str,
        seed: int,
        first_number: int,
    ):
        """Prepare nothing yet.

        Args:
            source: requests in order.
            writers: one a class of the workload.
            model: name that the server knows.
            seed: of the choice of texts.
            first_number: of the prompts, so that no two runs send the same ones.
        """
        self._source = source
        self._writers = writers
        self._model = model
        self._seed = seed
        self._first_number = first_number
        self._ready: dict[int, PreparedRequest] = {}
        self._made = 0
        self._over = False

    def make_ahead(self, count: int) -> None:
        """Have this many ready, or all there are."""
        while not self._over and len(self._ready) < count:
            self._make(min(BATCH, count - len(self._ready)))

    def take(self, number: int) -> PreparedRequest | None:
        """Return a request by its number, once; None when there are no more."""
        while not self._over and self._made <= number:
            self._make(1)
        return self._ready.pop(number, None)

    def _make(self, count: int) -> None:
        drawn = list(islice(self._source, count))
        self._over = len(drawn) < count
        bodies: list[tuple[int, bytes] | None] = [None] * len(drawn)
        for class_index, writer in enumerate(self._writers):
            places = [place for place, (request, _) in enumerate(drawn) if request.class_index == class_index]
            asked = [
                prompt_request(drawn[place][0], seed=self._seed, first_number=self._first_number) for place in places
            ]
            for place, prompt in zip(places, writer.write(asked) if asked else [], strict=True):
                bodies[place] = prompt.tokens, self._body(prompt.text, drawn[place][0].output_tokens)
        for (request, think_s), made in zip(drawn, bodies, strict=True):
            assert made is not None
            self._ready[self._made] = PreparedRequest(request, think_s, *made)
            self._made += 1

    def _body(self, prompt: str, output_tokens: int) -> bytes:
        return json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": output_tokens,
                "min_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            ensure_ascii=False,
        ).encode()
