import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.kit.client import Client
from tests.kit.processes import CLASSES
from tests.kit.scene import Scene, scene

OURS = {"x-request-id", "date", "server"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("routing"), {"code": 2, "maths": 1, "talk": 1, "rest": 1}) as built:
        yield built


def test_a_prompt_goes_to_the_expert_of_its_class(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        for name in CLASSES:
            reply = await client.complete(f"some {name} please")
            assert reply.outcome == "completed"
            assert reply.headers["x-expert-router-class"] == name
            assert reply.headers["x-expert-router-expert"] == name
            assert b'"model": "%b"' % name.encode() in reply.body

    fleet.play(story)


def test_a_request_for_an_expert_goes_there_whatever_its_class(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        reply = await client.complete("some code", model="maths")
        assert reply.headers["x-expert-router-expert"] == "maths"
        for virtual in ("expert-router", "tested"):
            reply = await client.complete("some code", model=virtual)
            assert reply.headers["x-expert-router-expert"] == "code"
        unknown = await client.complete("some code", model="other")
        assert unknown.status == 404
        assert unknown.json["error"]["message"] == "the model 'other' does not exist"

    fleet.play(story)


def test_a_header_overrides_the_classifier(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        reply = await client.complete("some code", headers={"x-expert-router-class": "talk"})
        assert reply.headers["x-expert-router-expert"] == "talk"
        wrong = await client.complete("some code", headers={"x-expert-router-class": "tlak"})
        assert wrong.status == 400
        assert "must be one of code, maths, talk, rest; got 'tlak'" in wrong.json["error"]["message"]

    fleet.play(story)


def test_token_ids_need_a_class_or_a_model(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        body = {"prompt": [1, 2, 3], "max_tokens": 2, "stream": True}
        assert "cannot be classified" in (await client.request("/v1/completions", body)).json["error"]["message"]
        reply = await client.request("/v1/completions", body, {"x-expert-router-class": "maths"})
        assert reply.headers["x-expert-router-expert"] == "maths"
        assert (await client.request("/v1/completions", {**body, "model": "talk"})).outcome == "completed"

    fleet.play(story)


def test_chat_is_classified_by_what_users_say(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        messages = [
            {"role": "system", "content": "maths only"},
            {"role": "user", "content": [{"type": "text", "text": "let us"}, {"type": "text", "text": "talk"}]},
        ]
        reply = await client.request("/v1/chat/completions", {"messages": messages, "max_tokens": 2, "stream": True})
        assert reply.headers["x-expert-router-expert"] == "talk"
        assert b"chat.completion.chunk" in reply.body

    fleet.play(story)


def test_headers_tell_when_and_how_it_was_routed(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        given = {"x-request-id": "abc-1", "traceparent": "00-4bf92f-00f067-01", "accept": "text/event-stream"}
        reply = await client.complete("maths", headers={**given, "authorization": "Bearer me", "cookie": "a=b"})
        headers = reply.headers
        received_s, chosen_s = (float(headers[f"x-expert-router-{name}-s"]) for name in ("received", "chosen"))
        assert reply.sent_s <= received_s <= chosen_s <= reply.times_s[0]
        durations = [float(headers[f"x-expert-router-{name}-s"]) for name in ("classify", "queue")]
        assert durations[0] > 0
        assert sum(durations) <= chosen_s - received_s
        assert headers["x-request-id"] == "abc-1"
        assert headers["x-expert-router-replica"] == "0"
        at_expert = fleet.experts["maths"][0].state()["last_headers"]
        assert {name: at_expert[name] for name in given} == given
        assert set(at_expert) == {*given, "host", "content-type", "content-length"}

    fleet.play(story)


def test_models_are_the_experts_and_the_fleet(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        reply = await client.request("/v1/models")
        assert [model["id"] for model in reply.json["data"]] == [*CLASSES, "expert-router", "tested"]

    fleet.play(story)


def test_a_long_prompt_is_classified_in_another_process(fleet: Scene) -> None:
    async def story(client: Client) -> None:
        reply = await client.complete("word " * 20_000 + "maths")
        assert reply.headers["x-expert-router-expert"] == "maths"

    fleet.play(story)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", [{}, {"stream_options": {"include_usage": True}}, {"max_tokens": 0}])
def test_g18_through_the_gateway_is_what_the_expert_sent(
    fleet: Scene, chat: bool, stream: bool, what: dict[str, object]
) -> None:
    async def story(client: Client) -> None:
        prompt = {"messages": [{"role": "user", "content": "maths"}]} if chat else {"prompt": "maths"}
        body = {"model": "maths", **prompt, "max_tokens": 5, "stream": stream, **what}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        ids = {"x-request-id": "same"}
        through = await client.request(path, body, ids)
        expert = Client(fleet.experts["maths"][0].port)
        direct = await expert.request(path, body, ids)
        expert.close()
        assert (through.status, through.body) == (direct.status, direct.body)
        added = {name for name in through.headers if name.startswith("x-expert-router-")}
        assert set(through.headers) - added - OURS == set(direct.headers) - OURS
        for name in set(direct.headers) - OURS:
            assert through.headers[name] == direct.headers[name]

    fleet.play(story)


def test_g19_the_openai_client_reads_answers_errors_and_retry_after(fleet: Scene) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{fleet.gateway.port}/v1", api_key="any", max_retries=0) as client:
        whole = client.chat.completions.create(
            model="tested", messages=[{"role": "user", "content": "maths"}], max_tokens=3
        )
        assert whole.model == "maths"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3
        stream = client.completions.create(model="tested", prompt="maths", max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream).count(" word") == 4
        assert [model.id for model in client.models.list()][:2] == ["code", "maths"]
        broken = client.completions.create(
            model="maths", prompt="x", max_tokens=4, stream=True, extra_body={"mock": {"cut_after": 2}}
        )
        with pytest.raises(openai.APIError, match="broke off"):
            list(broken)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="x")
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="maths", prompt="x", max_tokens=0)


def test_g19_the_openai_client_tries_again_when_told(tmp_path: Path) -> None:
    limits = {"max_in_flight_per_replica": 1, "max_queued_per_expert": 0}
    with scene(tmp_path, behaviour={"ttft_s": 2.0}, limits=limits) as fleet:

        async def story(client: Client) -> None:
            other = asyncio.create_task(client.complete("x", timeout_s=20))
            await asyncio.sleep(0.1)
            base = f"http://127.0.0.1:{fleet.gateway.port}/v1"
            async with openai.AsyncOpenAI(base_url=base, api_key="any", max_retries=0) as hasty:
                with pytest.raises(openai.RateLimitError) as refused:
                    await hasty.completions.create(model="code", prompt="x", max_tokens=1)
                assert int(refused.value.response.headers["retry-after"]) >= 1
            async with openai.AsyncOpenAI(base_url=base, api_key="any", max_retries=9) as patient:
                began_s = asyncio.get_running_loop().time()
                assert (await patient.completions.create(model="code", prompt="x", max_tokens=1)).usage is not None
                assert asyncio.get_running_loop().time() - began_s > 0.9
            assert (await other).outcome == "completed"

        fleet.play(story)
