import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.kit.client import Client
from tests.kit.processes import Expert, GatewayProcess, Process, config_for, running, until
from tests.kit.scene import scene


def test_g10_a_drain_finishes_what_is_under_way(tmp_path: Path) -> None:
    with scene(tmp_path, behaviour={"itl_s": 0.02}) as fleet:

        async def story(client: Client) -> None:
            loop = asyncio.get_running_loop()
            streams = [asyncio.create_task(client.complete("code", max_tokens=150)) for _ in range(200)]
            await until(lambda: fleet.experts["code"][0].state()["running"] == 200)
            assert (await client.request("/ready")).status == 200
            told_s = loop.time()
            fleet.gateway.signal(signal.SIGTERM)
            while (await client.request("/ready")).status == 200:
                assert loop.time() - told_s < 1
            print(f"G10: not ready {(loop.time() - told_s) * 1e3:.0f} ms after SIGTERM")
            assert (await client.request("/health")).status == 200
            refused = await client.complete("code")
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            replies = await asyncio.gather(*streams)
            assert {reply.outcome for reply in replies} == {"completed"}
            last_s = loop.time()
            assert await asyncio.to_thread(fleet.gateway.process.wait) == 0
            print(f"G10: exit {loop.time() - last_s:.2f} s after the last of 200 streams")
            assert loop.time() - last_s < 2

        fleet.play(story)
        assert fleet.check_ledger() == {"completed": 200, "failed: 503": 1}


@pytest.mark.parametrize("signals", [1, 2])
def test_g10_a_drain_ends_in_time_or_at_once_with_error_events(tmp_path: Path, signals: int) -> None:
    drain_s = 1.0 if signals == 1 else 60.0
    with scene(tmp_path, behaviour={"itl_s": 0.05}, drain_s=drain_s) as fleet:

        async def story(client: Client) -> None:
            loop = asyncio.get_running_loop()
            streams = [asyncio.create_task(client.complete("code", max_tokens=10_000)) for _ in range(20)]
            early = asyncio.create_task(client.complete("code", mock={"ttft_s": 60}))
            await until(lambda: fleet.experts["code"][0].state()["running"] == 21)
            told_s = loop.time()
            for _ in range(signals):
                fleet.gateway.signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
            replies = await asyncio.gather(*streams)
            assert {(reply.errors, reply.is_done) for reply in replies} == {(1, True)}
            assert (await early).status == 503
            assert await asyncio.to_thread(fleet.gateway.process.wait) == 0
            print(f"G10: exit {loop.time() - told_s:.2f} s after the first of {signals} SIGTERM")
            assert loop.time() - told_s < 1 + 1.5

        fleet.play(story)
        fleet.check_ledger()
        assert {line["outcome"] for line in fleet.gateway_log()} == {"drained"}


def test_a_killed_worker_is_started_again_and_none_outlives_the_parent(tmp_path: Path) -> None:
    with scene(tmp_path, {"code": 1}, {"itl_s": 0.02}, router={"workers": 2}) as fleet:

        async def story(client: Client) -> None:
            before = fleet.gateway.workers()
            assert len(before) == 2
            streams = [asyncio.create_task(client.complete("code", max_tokens=100)) for _ in range(20)]
            await asyncio.sleep(0.5)
            os.kill(before[0], signal.SIGKILL)
            replies = await asyncio.gather(*streams)
            assert {reply.outcome for reply in replies} <= {"completed", "failed: cut"}
            took_s = await until(lambda: len(set(fleet.gateway.workers()) - set(before)) == 1)
            print(f"killed worker replaced in {took_s:.2f} s, {sum(r.end == 'cut' for r in replies)} of 20 cut")
            await until(lambda: fleet.gateway.total("inflight") == 0)
            replies = await asyncio.gather(*(client.complete("code") for _ in range(20)))
            assert {reply.outcome for reply in replies} == {"completed"}
            workers = fleet.gateway.workers()
            fleet.gateway.kill()
            await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))

        fleet.play(story)


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        ({"host": "0.0.0.0"}, "serve.host '0.0.0.0' can be reached from other machines, so serve.api_key_env must"),
        ({"api_key_env": "UNSET_KEYS"}, "serve.api_key_env names UNSET_KEYS, which is not set"),
        ({"port": None}, "serve.port"),
        ({"metrics_port": None}, "serve.metrics_port"),
        ({"classifier": {"kind": "tfidf", "file": "/nowhere.npz"}}, "/nowhere.npz"),
    ],
)
def test_what_keeps_it_from_beginning_is_said_in_one_line(tmp_path: Path, serve: dict[str, object], says: str) -> None:
    with running(expert := Expert("code")):
        if None in serve.values():
            serve = dict.fromkeys(serve, expert.port)
            says += f" {expert.port} on 127.0.0.1 cannot be used: Address already in use"
        config = config_for({"code": [expert.url]}, **serve)  # type: ignore[arg-type]
        path = tmp_path / "config.json"
        path.write_text(config.model_dump_json())
        gateway = Process("real.gateway", str(path))
        with running(gateway):
            gateway.process.wait(30)
            error = gateway.error_text()
        assert gateway.process.returncode == 2
        assert error.count("\n") == 1
        assert says in error


def test_it_begins_while_experts_are_down_and_takes_them_in_when_they_come(tmp_path: Path) -> None:
    expert = Expert("code")
    expert.kill()
    gateway = GatewayProcess(config_for({"code": [expert.url]}), tmp_path)
    with running(gateway, expert):

        async def story(client: Client) -> None:
            assert (await client.request("/ready")).status == 503
            assert (await client.complete("code")).status == 503
            with running(Expert("code", port=expert.port)):
                began_s = time.monotonic()
                while (await client.request("/ready")).status == 503:
                    await asyncio.sleep(0.05)
                    assert time.monotonic() - began_s < 5
                assert (await client.complete("code")).outcome == "completed"

        from tests.kit.client import play

        play(gateway.port, story)
