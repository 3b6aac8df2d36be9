import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from real.gateway.event_stream import EventStream
from tests.kit.client import Client
from tests.kit.scene import Scene, scene

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=12)
EVENTS = st.one_of(
    TEXTS.map(lambda text: f'data: {{"text": {json.dumps(text, ensure_ascii=False)}}}'),
    st.just('data: {"text": "data: [DONE]"}'),
    TEXTS.map(lambda text: f": {text}"),
    st.just("event: message\ndata: {}\nid: 7"),
    st.just(""),
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A stream of events as some server may word it, ended by ``[DONE]`` or not."""
    line_end = draw(st.sampled_from(["\n", "\r\n"]))
    events = draw(st.lists(EVENTS, max_size=8))
    text = "".join(event + "\n\n" for event in (*events, "data: [DONE]"))
    text = text if draw(st.booleans()) else text.removesuffix("data: [DONE]\n\n")
    return text.replace("\n", line_end).encode()


def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(0, len(data)))))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True) if end > start]


def followed(pieces: list[bytes]) -> tuple[bytes, int, int | None, bool]:
    """Bytes out, chunks, bytes in before the first chunk came out, and whether it was done."""
    events, out, came, first = EventStream(), b"", 0, None
    for piece in pieces:
        came += len(piece)
        out += events.whole(piece)
        if first is None and events.chunks:
            first = came
    out += events.remainder()
    return out, events.chunks, first, events.is_done


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_g13_any_split_gives_the_same_bytes_chunks_and_end(data: st.DataObject) -> None:
    stream = data.draw(streams())
    pieces = data.draw(st.composite(cuts)(stream))
    whole, split = followed([stream]), followed(pieces)
    assert whole[0] == split[0] == stream
    assert (whole[1], whole[3]) == (split[1], split[3])
    by_byte = followed([stream[index : index + 1] for index in range(len(stream))])
    assert (whole[1], whole[3]) == (by_byte[1], by_byte[3])
    # The first chunk comes out with the piece that holds the end of its event, whatever the split.
    came = itertools.accumulate(map(len, pieces))
    assert split[2] == (None if by_byte[2] is None else next(count for count in came if count >= by_byte[2]))


def test_g13_only_whole_events_are_passed_on_and_none_is_held_for_ever() -> None:
    events = EventStream()
    assert events.whole(b'data: {"a"') == b""
    assert events.whole(b": 1}\n\ndata: ") == b'data: {"a": 1}\n\n'
    assert events.whole(b"x" * 2**18) == b"data: " + b"x" * 2**18
    assert EventStream().remainder() == b""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("events")) as built:
        yield built


@given(stream=streams(), size=st.integers(1, 40))
@example(stream="data: é漢🎉\n\ndata: [DONE]\n\n".encode(), size=1)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_g13_through_the_gateway_bytes_stay_as_they_are(fleet: Scene, stream: bytes, size: int) -> None:
    async def story(client: Client) -> None:
        await client.complete("code", max_tokens=1)  # broken answers in a row would take the expert out
        reply = await client.complete("code", mock={"raw_stream": stream.decode("latin-1"), "pieces": size})
        if stream.replace(b"\r\n", b"\n").endswith(b"data: [DONE]\n\n"):
            assert reply.body == stream
        elif stream:
            assert reply.body.startswith(stream)
            assert reply.errors == 1

    fleet.play(story)


def test_g13_gateway_counts_chunks_as_they_were_sent(tmp_path: Path) -> None:
    with scene(tmp_path) as fleet:

        async def story(client: Client) -> None:
            for pieces in (None, 1, 7, 1000):
                await client.complete("code", max_tokens=25, mock={"pieces": pieces})

        fleet.play(story)
        assert [line["chunks"] for line in fleet.gateway_log()] == [25] * 4
        assert fleet.gateway.total("chunks_total", expert="code") == 100
