import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from real.gateway.completion_request import parse_completion
from real.gateway.error_events import Refusal
from tests.kit.client import Client, Reply
from tests.kit.scene import Scene, scene

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["code", "expert-router", "tested", "no", ""]) | ANYTHING,
        "prompt": st.text() | st.lists(st.text(), max_size=3) | st.lists(st.integers(), max_size=3) | ANYTHING,
        "messages": st.lists(
            st.fixed_dictionaries({}, optional={"role": st.just("user") | ANYTHING, "content": ANYTHING}), max_size=3
        )
        | ANYTHING,
        "stream": ANYTHING,
        "n": ANYTHING,
        "stream_options": st.none() | st.dictionaries(st.text(max_size=5), ANYTHING, max_size=2),
        "max_tokens": st.integers(1, 4),
    },
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("api")) as built:
        yield built


def check(reply: Reply) -> None:
    assert reply.end == "clean"
    assert reply.status in (200, 400, 404, 413), reply
    assert b"Traceback" not in reply.body
    if reply.status != 200:
        error = reply.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == reply.status


@given(fields=FIELDS | ANYTHING, chat=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_g14_any_json_gets_an_answer_or_a_plain_refusal(fleet: Scene, fields: Any, chat: bool) -> None:
    async def story(client: Client) -> None:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        check(await client.request(path, json.dumps(fields).encode()))

    fleet.play(story)


@given(body=st.binary(max_size=200))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_g14_any_bytes_get_a_plain_refusal(fleet: Scene, body: bytes) -> None:
    async def story(client: Client) -> None:
        check(await client.request("/v1/completions", body))

    fleet.play(story)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt":' + b'{"a":' * 100_000, "nested too deeply"),
        (b'{"prompt": "code", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "code", "temperature": 1e999}', "number in it is too large"),
        (b'{"prompt": "code", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "a", "model": 3}', "model must be a string"),
        (b'{"prompt": []}', "prompt must be"),
        (b'{"max_tokens": 3}', "prompt must be"),
        (b"[]", "must be a JSON object"),
        (b"", "not valid JSON"),
        (b'{"prompt": "a", "x": [' + b"[]," * 1_300_000 + b"[]]}", "more than 500,000 values"),
    ],
)
def test_g14_what_cannot_be_used_is_refused_in_a_sentence(fleet: Scene, body: bytes, says: str) -> None:
    async def story(client: Client) -> None:
        reply = await client.request("/v1/completions", body)
        assert reply.status == 400
        assert says in reply.json["error"]["message"]

    fleet.play(story)


def test_g14_odd_but_right_requests_reach_the_expert_as_they_are(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        for fields in (
            {"prompt": "lone \ud800 surrogate, code"},
            {"prompt": ["one", "two code"], "n": 3},
            {"prompt": "code", "seed": 10**30, "stream_options": {"include_usage": True}},
        ):
            assert (await client.request("/v1/completions", {**fields, "stream": True})).outcome == "completed"

    fleet.play(story)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "' + b"a " * 2_000_000 + b'"}',
        b'{"prompt": [' + b"7," * 499_000 + b"7]" + b" " * 3_000_000 + b"}",
        b'{"prompt": "a", "x": "' + rb"\u1234" * 600_000 + b'"}',
    ],
)
def test_g14_four_megabytes_are_read_in_no_time(body: bytes) -> None:
    took_s = []
    for _ in range(3):
        began_s = time.process_time()
        try:
            parse_completion(body, chat=False)
        except Refusal as refusal:
            raise AssertionError(refusal.message) from None
        took_s.append(time.process_time() - began_s)
    print(f"G14: {len(body) / 1e6:.1f} MB read in {min(took_s) * 1e3:.0f} ms")
    assert min(took_s) < 0.12
