"""The load client: what it measures is what the server did, and nothing that went wrong passes for an answer."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from real.users.client_lag import ClientLag
from real.users.load_client import Exchange, LoadClient, Patience
from real.users.load_connection import LoadConnection
from tests.real_fleet import free_port, token_server

PATIENCE = Patience(connect_s=5, first_token_s=5, idle_s=1, total_s=30)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with token_server(ttft_s=0.1, itl_s=0.02) as url:
        yield url


def body(prompt: str = "some words", tokens: int = 5) -> bytes:
    return json.dumps({"model": "one", "prompt": prompt, "max_tokens": tokens, "stream": True}).encode()


def ask(url: str, *bodies: bytes, patience: Patience = PATIENCE, at_once: bool = True) -> list[Exchange]:
    """Send all at once, or one after the other, and return what came back."""

    async def all_of_them() -> list[Exchange]:
        client = LoadClient(url, patience)
        loop = asyncio.get_running_loop()
        ended = []
        for number, each in enumerate(bodies):
            future: asyncio.Future[Exchange] = loop.create_future()
            client.send(each, f"test-{number}", future.set_result)
            ended.append(future)
            if not at_once:
                await future
        try:
            return list(await asyncio.gather(*ended))
        finally:
            client.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(all_of_them())


def test_times_are_those_that_the_server_kept(server: str) -> None:
    """Compared with the times at which the server really sent, so that a busy machine changes nothing."""
    before = len(sent_to(server))
    exchanges = ask(server, *[body(tokens=11)] * 20)
    kept = {each["x-request-id"]: each["chunk_s"] for each in sent_to(server)[before:]}
    late_s = np.array([each.chunk_s for each in exchanges]) - np.array([kept[f"test-{n}"] for n in range(20)])
    assert late_s.min() >= 0
    assert np.median(late_s) < 0.01
    assert min(each.first_token_s - each.sent_s for each in exchanges) >= 0.099


def test_usage_is_the_servers_own(server: str) -> None:
    (exchange,) = ask(server, body("one two three four", tokens=3))
    assert exchange.failure == ""
    assert exchange.status == 200
    assert exchange.usage == {"prompt_tokens": 4, "completion_tokens": 3}


def test_connections_are_used_again(server: str) -> None:
    """Twenty requests in a row; the server lists the ports they came from."""
    before = len(sent_to(server))
    ask(server, *[body(tokens=1)] * 20, at_once=False)
    assert len({each["port"] for each in sent_to(server)[before:]}) == 1


def test_request_ids_go_out(server: str) -> None:
    before = len(sent_to(server))
    ask(server, *[body(tokens=1)] * 3)
    assert {each["x-request-id"] for each in sent_to(server)[before:]} == {"test-0", "test-1", "test-2"}


def sent_to(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/requests") as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())
    return found


@pytest.mark.parametrize(
    ("prompt", "failure", "tokens"),
    [
        ("fail:400 ", "HTTP 400", 0),
        ("fail:429 ", "HTTP 429", 0),
        ("fail:503 ", "HTTP 503", 0),
        ("fail:error ", "error event", 3),
        ("fail:cut ", "connection lost", 3),
        ("fail:silent ", "ended without [DONE]", 3),
        ("fail:stall ", "idle timeout", 3),
    ],
)
def test_what_goes_wrong_is_a_failure_of_its_kind(server: str, prompt: str, failure: str, tokens: int) -> None:
    bad, good = ask(server, body(prompt), body())
    assert (bad.failure, len(bad.chunk_s)) == (failure, tokens)
    assert (good.failure, len(good.chunk_s)) == ("", 5)


def test_the_servers_words_are_kept(server: str) -> None:
    refused, broken = ask(server, body("fail:429 "), body("fail:error "))
    assert (refused.detail, refused.headers["retry-after"]) == ("no", "1")
    assert broken.detail == "engine died"


def test_no_server_is_a_refused_connection() -> None:
    (exchange,) = ask(f"http://127.0.0.1:{free_port()}", body())
    assert exchange.failure == "connection refused"


def test_patience_ends(server: str) -> None:
    short = Patience(connect_s=5, first_token_s=0.01, idle_s=1, total_s=30)
    assert ask(server, body("fail:mute "), patience=short)[0].failure == "first token timeout"


ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"X-Expert-Router-Expert: code\r\n\r\n"
)
EVENTS = [
    b'data: {"choices":[{"index":0,"text":" a"}]}\n\n',
    b': a comment\n\ndata: {"choices": [{"index":0,"text":"\\"choices\\":[] [DONE] \\u00e9"}]}\n\n',
    'data: {"choices":[{"index":0,"text":"über\\n\\n"}]}\n\n'.encode(),
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3}}\n\ndata: [DONE]\n\n',
]


class _Nowhere(asyncio.Transport):
    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass


class _Listener:
    def __init__(self) -> None:
        self.ended: list[tuple[Exchange, str]] = []

    def end(self, exchange: Exchange, failure: str, detail: str = "") -> None:
        self.ended.append((exchange, failure))

    def release(self, connection: object) -> None:
        pass


@given(st.sets(st.integers(min_value=1, max_value=700)), st.booleans())
def test_an_answer_means_the_same_however_its_bytes_are_split(cuts: set[int], crlf: bool) -> None:
    events = [event.replace(b"\n", b"\r\n") if crlf else event for event in EVENTS]
    wire = ANSWER + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"
    edges = [0, *sorted(cut for cut in cuts if cut < len(wire)), len(wire)]
    listener: Any = _Listener()
    connection = LoadConnection(listener)
    connection.connection_made(_Nowhere())
    exchange = Exchange(lambda ended: None)
    connection.start(exchange, b"")
    for start, end in pairwise(edges):
        connection.data_received(wire[start:end])
    assert listener.ended == [(exchange, "")]
    assert len(exchange.chunk_s) == 3
    assert exchange.usage == {"prompt_tokens": 3, "completion_tokens": 3}
    assert exchange.headers == {"x-expert-router-expert": "code"}


def test_a_client_that_is_held_up_says_so() -> None:
    async def held_up(block_s: float) -> list[str]:
        lag = ClientLag(asyncio.get_running_loop())
        for _ in range(10):
            await asyncio.sleep(0.02)
            end = asyncio.get_running_loop().time() + block_s
            while asyncio.get_running_loop().time() < end:
                pass
        lag.sent(1.0, 1.5)
        lag.stop()
        return lag.notes(0.2)

    notes = asyncio.run(held_up(0.05))
    assert any("did not keep up" in note for note in notes)
    assert any("sent late: by 500.0 ms" in note for note in notes)


@pytest.mark.parametrize(("parts", "failure"), [(4, ""), (3, "connection lost"), (0, "connection lost")])
def test_a_connection_cut_after_the_end_was_said_fails_nothing(parts: int, failure: str) -> None:
    listener: Any = _Listener()
    connection = LoadConnection(listener)
    connection.connection_made(_Nowhere())
    exchange = Exchange(lambda ended: None)
    connection.start(exchange, b"")
    connection.data_received(ANSWER + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in EVENTS[:parts]))
    connection.connection_lost(None)
    assert listener.ended == [(exchange, failure)]
