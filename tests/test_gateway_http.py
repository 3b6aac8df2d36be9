import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from real.gateway.error_events import Refusal
from real.gateway.event_stream import EventStream
from real.gateway.request_parser import Request, RequestParser
from real.gateway.response_body import ChunkedBody, MalformedBodyError, SizedBody, body_of
from tests.kit.client import Client, wire_request
from tests.kit.scene import scene
from tests.kit.wire import MALFORMED, exchange, statuses

LINES = st.text("abc: ;=\t", max_size=8).map(str.encode)


def pieces_of(data: st.DataObject, wire: bytes) -> list[bytes]:
    places = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=30)))
    return [wire[start:end] for start, end in zip([0, *places], [*places, len(wire)], strict=True) if end > start]


def chunked(draw_contents: list[bytes], extension: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(each), extension, each) for each in draw_contents if each)


# --------------------------------------------------------------------------------------------------------- requests


def parsed(pieces: list[bytes], most_bytes: int = 100) -> list[tuple[bytes, bytes, dict[bytes, bytes], bytes, bool]]:
    seen: list[Request] = []
    parser = RequestParser(seen.append, most_bytes)
    for piece in pieces:
        parser.feed(piece)
    assert parser.partial is None
    return [(each.method, each.path, each.headers, bytes(each.body), each.keep_alive) for each in seen]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_split_of_the_bytes_gives_the_same_requests(data: st.DataObject) -> None:
    bodies = data.draw(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
    wire, expected = b"", []
    for number, body in enumerate(bodies):
        offers = b"Upgrade: h2c\r\nConnection: Upgrade\r\n" if data.draw(st.booleans()) else b""
        if data.draw(st.booleans()):
            framing, content = b"Transfer-Encoding: chunked\r\n", chunked([body]) + b"0\r\nX-Trailer: a\r\n\r\n"
        else:
            framing, content = b"Content-Length: %d\r\n" % len(body), body
        wire += b"POST /v1/%d?q=1 HTTP/1.1\r\nHost: a\r\n%b%bX-A: b\r\n\r\n%b" % (number, offers, framing, content)
        expected.append((b"POST", b"/v1/%d" % number, b"b", body, True))
    for pieces in ([wire], pieces_of(data, wire), [wire[index : index + 1] for index in range(len(wire))]):
        found = parsed(pieces)
        assert [(method, path, headers[b"x-a"], body, keep) for method, path, headers, body, keep in found] == expected
        assert all(b"x-trailer" not in headers for _, _, headers, _, _ in found)


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000, 431),  # no end in sight
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n" + b"a" * 101, 413),
    ],
)
def test_what_must_not_be_read_is_refused(wire: bytes, status: int) -> None:
    for size in (len(wire), 100):
        with pytest.raises(Refusal) as refused:
            parsed([wire[start : start + size] for start in range(0, len(wire), size)])
        assert refused.value.status == status


BROKEN = st.sampled_from([case.wire[:3000] for case in MALFORMED])
NOISE = st.sampled_from(
    [b"\r\n", b"Upgrade: x\r\nConnection: upgrade\r\n", b"Host: z\r\n", b"\x00", b"\xff", b" ", b"\r", b"\n"]
)


@given(
    wire=BROKEN, noise=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 5), NOISE), max_size=3), data=st.data()
)
@settings(max_examples=300, deadline=None)
def test_whatever_comes_is_read_or_refused(
    wire: bytes, noise: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    for place, cut, added in noise:
        wire = wire[:place] + added + wire[place + cut :]
    parser = RequestParser(lambda request: None, 1000)
    with contextlib.suppress(Refusal):
        for piece in pieces_of(data, wire):
            parser.feed(piece)


def test_who_is_refused_early_gets_the_answer_though_it_still_sends(tmp_path: Path) -> None:
    with scene(tmp_path, api_key_env="TEST_KEYS", environment={"TEST_KEYS": "sk-1"}) as fleet:

        async def story(client: Client) -> None:
            body = b'{"prompt":"%b"}' % (b"a" * 4_000_000)
            for _ in range(10):
                assert (await client.request("/v1/completions", body)).status == 401

        fleet.play(story)


def test_nobody_has_to_take_up_another_protocol(tmp_path: Path) -> None:
    with scene(tmp_path) as fleet:

        async def story(client: Client) -> None:
            offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAA"}
            body = b'{"prompt":"code","max_tokens":1,"stream":true}'
            one = wire_request("/v1/completions", body, {**offer, "x-request-id": "u-1"})
            two = wire_request("/v1/completions", body, {"connection": "close", "x-request-id": "u-2"})
            answer = await exchange(fleet.gateway.port, one + two)
            assert statuses(answer) == [200, 200]
            assert answer.count(b"data: [DONE]") == 2
            hidden = wire_request("/v1/completions", one, {**offer, "x-request-id": "u-3"})
            assert statuses(await exchange(fleet.gateway.port, hidden, wait_s=1.0)) == [400]  # its body is no JSON
            assert fleet.experts["code"][0].state()["prompts"] == 2

        fleet.play(story)


# ---------------------------------------------------------------------------------------------------------- answers


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_split_of_chunks_gives_the_same_body(data: st.DataObject) -> None:
    contents = data.draw(st.lists(st.binary(max_size=20), max_size=5))
    extension = data.draw(st.sampled_from([b"", b";a=b", b" ; x"]))
    wire = chunked(contents, extension) + b"0\r\n" + data.draw(st.sampled_from([b"", b"A: b\r\n"])) + b"\r\n"
    rest = data.draw(st.sampled_from([b"", b"HTTP/1.1 200"]))
    for pieces in ([wire + rest], pieces_of(data, wire + rest)):
        body, out, came = ChunkedBody(), b"", 0
        for piece in pieces:
            assert not body.done or came >= len(wire)
            if not body.done:
                out += body.feed(piece)
            came += len(piece)
        assert body.done
        assert out == b"".join(contents)


@given(st.lists(st.sampled_from([b"1", b"\r\n", b"a", b"0", b";", b"\r", b"\n", b" ", b"-", b"_", b"x"]), max_size=12))
@example([b"1", b"\r\n", b"a", b"a", b"\r\n"])
@settings(max_examples=300, deadline=None)
def test_malformed_chunks_never_pass_for_a_whole_body(parts: list[bytes]) -> None:
    wire = b"".join(parts)
    outcomes = []
    for pieces in ([wire], [wire[index : index + 1] for index in range(len(wire))]):
        body, out = ChunkedBody(), b""
        try:
            for piece in pieces:
                if not body.done:
                    out += body.feed(piece)
            outcomes.append((body.done, out if body.done else b""))
        except MalformedBodyError:
            outcomes.append((False, b"malformed"))
    assert outcomes[0] == outcomes[1] or not (outcomes[0][0] or outcomes[1][0])


def test_bodies_end_where_their_heads_say() -> None:
    assert isinstance(body_of(200, [(b"transfer-encoding", b"Chunked")]), ChunkedBody)
    for status, length, done in ((200, b"0", True), (204, None, True), (304, None, True), (200, None, False)):
        assert body_of(status, [] if length is None else [(b"content-length", length)]).done is done
    sized = SizedBody(5)
    assert (sized.feed(b"abc"), sized.done, sized.feed(b"defg"), sized.done, sized.rest) == (
        b"abc",
        False,
        b"de",
        True,
        b"fg",
    )
    with pytest.raises(MalformedBodyError):
        body_of(200, [(b"transfer-encoding", b"gzip")])


CONTENTS = st.one_of(
    st.binary(max_size=5000),
    st.binary(max_size=300).map(lambda data: data + b"\n\n"),
    st.text(max_size=300).map(lambda text: b"data: %b\n\n" % json.dumps({"id": text}).encode()),
    st.sampled_from([b'data: {"error": {}}\n\n', b"data: [DONE]\n\n", b": ping\n\n", b"event: a\ndata: {}\n\n", b"\n"]),
    st.just(b'data: {"a": 1}\n\ndata: {"error": 2}\n\n'),
)


@given(st.lists(CONTENTS, min_size=1, max_size=6), st.sampled_from([b"%x", b"%x", b"%X", b"0%x", b" %x"]))
@settings(max_examples=500, deadline=None)
def test_only_a_tokens_chunk_goes_on_as_it_is_and_all_is_noted_the_same(contents: list[bytes], size: bytes) -> None:
    quick, slow = EventStream(), EventStream()
    for content in contents:
        slow.whole(content)
        for wire in (size % len(content) + b"\r\n" + content + b"\r\n", content):
            if EventStream().is_token(wire):
                assert wire == b"%x\r\n%b\r\n" % (len(content), content)
                body = ChunkedBody()
                assert body.feed(wire) == content
                assert (body.between, body.done) == (True, False)
                assert content.startswith(b'data: {"')
                assert content.endswith(b"\n\n")
        wire = b"%x\r\n%b\r\n" % (len(content), content)
        if not (quick.is_between and quick.is_token(wire)):
            quick.whole(content)
        assert (quick.chunks, quick.is_done, quick.is_error) == (slow.chunks, slow.is_done, slow.is_error)
    token = b'data: {"id": 1}\n\n'
    assert EventStream().is_token(b"%x\r\n%b\r\n" % (len(token), token))
