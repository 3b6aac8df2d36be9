import asyncio
import math
import time
from pathlib import Path

import numpy as np

from tests.kit.client import Client, Connection, Reply, wire_request
from tests.kit.processes import fetch_json, open_files, until
from tests.kit.scene import Scene, scene


def rate(replies: list[Reply]) -> float:
    """Answers a second, from the first request sent to the last answer."""
    return len(replies) / (max(reply.ended_s for reply in replies) - min(reply.sent_s for reply in replies))


async def nothing_under_way(fleet: Scene) -> float:
    return await until(
        lambda: (
            fleet.gateway.total("open_requests") == 0
            and fleet.gateway.total("inflight") == 0
            and fleet.gateway.total("queue_depth") == 0
        )
    )


def test_g7_when_clients_leave_the_expert_is_told_and_nothing_is_left_behind(tmp_path: Path) -> None:
    limits = {"max_in_flight_per_replica": 150, "max_queued_per_expert": 100}
    with scene(tmp_path, behaviour={"itl_s": 0.05}, limits=limits) as fleet:
        expert = fleet.experts["code"][0]

        async def come(client: Client, count: int) -> list[asyncio.Task[Reply]]:
            """Half of them get bytes, half wait for their first."""
            return [
                asyncio.create_task(client.complete("code", max_tokens=1000, mock={"ttft_s": 60.0 * (index % 2)}))
                for index in range(count)
            ]

        def with_expert(*what: str) -> set[str]:
            """The requests of which its log says so."""
            return {line["id"] for line in fleet.expert_logs()["code-0"] if line["what"] in what}

        def leave(connections: list[Connection]) -> set[str]:
            ids = {connection.reply.request_id for connection in connections if connection.reply is not None}
            for connection in connections:
                connection.leave()
            return ids

        async def fill(client: Client) -> list[asyncio.Task[Reply]]:
            inside = await come(client, 150)
            await until(lambda: expert.state()["running"] == 150)
            waiting = await come(client, 50)
            await until(lambda: fleet.gateway.total("queue_depth") == 50)
            return inside + waiting

        async def story(client: Client) -> None:
            loop = asyncio.get_running_loop()

            # Those who wait leave first: no expert hears of them.
            tasks = await fill(client)
            leave(client.open[150:])
            await until(lambda: fleet.gateway.total("queue_depth") == 0)
            assert expert.state()["running"] == 150
            gone = leave(client.open[:150])
            left_s = time.monotonic()
            await until(lambda: expert.state()["running"] == 0)
            late_s = max(line["s"] for line in fleet.expert_logs()["code-0"] if line["what"] == "cancelled") - left_s
            print(f"G7: 150 left before their first byte or in mid-stream, cancelled within {late_s * 1e3:.0f} ms")
            assert late_s < 1.0
            assert with_expert("start") == with_expert("cancelled") == gone
            assert {reply.outcome for reply in await asyncio.gather(*tasks)} == {"cancelled"}

            # All leave at once: one who waits may still get the place of one who left before.
            tasks = await fill(client)
            at_once_inside = leave(client.open[:150])
            at_once = at_once_inside | leave(client.open[150:])
            assert {reply.outcome for reply in await asyncio.gather(*tasks)} == {"cancelled"}
            await nothing_under_way(fleet)
            await until(lambda: expert.state()["running"] == 0)
            placed = {line["request_id"] for line in fleet.gateway_log() if line["replica"] is not None}
            reached = with_expert("start")
            assert gone | at_once_inside <= reached <= placed <= gone | at_once
            assert with_expert("cancelled") == reached
            print(f"G7: of 50 who waited, {len(placed & at_once) - 150} got the place of one who left before them,")
            print(f"G7: and {len(reached & at_once) - 150} of these got as far as the expert")

            worker = fleet.gateway.workers()[0]
            files, began_s = open_files(worker), loop.time()
            for _ in range(50):
                early = asyncio.create_task(client.complete("code", max_tokens=1000, mock={"ttft_s": 60}))
                await until(lambda: expert.state()["running"] == 1, every_s=0.002)
                leave(list(client.open))
                await asyncio.gather(
                    early,
                    *(client.complete("code", max_tokens=1000, leave_after_chunks=1 + index) for index in range(2)),
                )
                await until(lambda: expert.state()["running"] == 0, every_s=0.002)
            await nothing_under_way(fleet)
            print(f"G7: 50 rounds in {loop.time() - began_s:.1f} s, {open_files(worker) - files:+d} files")
            assert open_files(worker) <= files + 3
            assert expert.state()["ended"] == {"cancelled": len(reached) + 150}
            assert fleet.gateway.total("client_disconnects_total") == 400 + 150

        fleet.play(story)
        assert fleet.check_ledger() == {"cancelled": 550}


def test_g8_beyond_the_cap_requests_wait_or_are_refused_and_the_admitted_do_as_well(tmp_path: Path) -> None:
    limits = {"max_in_flight_per_replica": 16, "max_queued_per_expert": 8}
    with scene(tmp_path, {"code": 1, "talk": 1}, {"itl_s": 0.02}, limits=limits) as fleet:

        async def story(client: Client) -> None:
            loop = asyncio.get_running_loop()

            async def load(users: int, name: str, end_s: float) -> list[Reply]:
                replies = []

                async def user() -> None:
                    while loop.time() < end_s:
                        reply = await client.complete(name, max_tokens=10)
                        replies.append(reply)
                        if reply.status == 429:
                            await asyncio.sleep(0.25)

                await asyncio.gather(*(user() for _ in range(users)))
                return replies

            async def watch(end_s: float) -> tuple[float, float]:
                in_flight = queued = 0.0
                while loop.time() < end_s:
                    sample = await asyncio.to_thread(fleet.gateway.metrics)
                    in_flight = max(in_flight, sample.get('expert_router_inflight{expert="code",replica="0"}', 0))
                    queued = max(queued, sample.get('expert_router_queue_depth{expert="code"}', 0))
                    await asyncio.sleep(0.05)
                return in_flight, queued

            async def stretch(users: int) -> tuple[list[Reply], list[Reply], tuple[float, float]]:
                end_s = loop.time() + 1
                return await asyncio.gather(load(users, "code", end_s), load(2, "talk", end_s), watch(end_s))

            # In pairs, and the median of them: this may be a shared machine, which now and then stands still.
            goodput, beside = [], []
            for _ in range(5):
                at_cap, talk_before, _ = await stretch(16)
                over, talk, (in_flight, queued) = await stretch(80)
                good = [reply for reply in over if reply.outcome == "completed"]
                refused = [reply for reply in over if reply.status == 429]
                assert len(good) + len(refused) == len(over)
                assert refused
                assert {reply.outcome for reply in at_cap + talk_before + talk} == {"completed"}
                assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
                assert 0 < in_flight <= 16
                assert queued <= 8
                goodput.append(rate(good) / rate(at_cap))
                beside.append(rate(talk) / rate(talk_before))
                p50_ms, p99_ms = np.percentile([reply.took_s for reply in refused], [50, 99]) * 1e3
                print(f"G8: 429 p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms; at five times the cap, of what was at it:")
                print(f"G8: goodput {goodput[-1]:.2f}, the other class {beside[-1]:.2f}")
            assert fleet.experts["code"][0].state()["running_max"] <= 16
            assert np.median(goodput) > 0.85
            assert np.median(beside) > 0.75, "starved"

        fleet.play(story)
        fleet.check_ledger()


def test_g9_readers_who_stop_hold_little_memory_and_nobody_else_up(tmp_path: Path) -> None:
    timeouts = {"slow_reader_s": 4.0}
    with scene(tmp_path, {"code": 1, "talk": 1}, timeouts=timeouts) as fleet:

        async def story(client: Client) -> None:
            loop = asyncio.get_running_loop()
            fetch_json(f"{fleet.experts['talk'][0].url}/mock/behave", b'{"itl_s": 0.02}')
            await client.complete("code", max_tokens=50)
            alone = await client.complete("talk", max_tokens=100)
            before_mb = fleet.gateway.resident_mb()
            body = b'{"prompt": "code", "stream": true, "max_tokens": 40000, "mock": {"pad": 1000}}'
            slow: list[Connection] = []

            async def stop_reading() -> None:
                """Twenty begin to read and stop."""
                for _ in range(20):
                    transport, connection = await loop.create_connection(Connection, "127.0.0.1", fleet.gateway.port)
                    request_id = f"slow-{len(slow)}"
                    connection.send(wire_request("/v1/completions", body, {"x-request-id": request_id}), request_id)
                    transport.pause_reading()
                    slow.append(connection)
                await asyncio.sleep(1.5)

            await stop_reading()
            first_mb = fleet.gateway.resident_mb()
            beside = await client.complete("talk", max_tokens=100)
            second_mb = fleet.gateway.resident_mb()
            assert beside.outcome == "completed"
            gaps_ms = [float(np.percentile(np.diff(reply.times_s), 99)) * 1e3 for reply in (alone, beside)]
            await nothing_under_way(fleet)
            after_mb = fleet.gateway.resident_mb()
            print(
                f"G9: RSS {before_mb:.0f} MB, with 20 slow readers {first_mb:.0f} and {second_mb:.0f}, "
                f"after them {after_mb:.0f}; gap p99 {gaps_ms[0]:.1f} ms alone, {gaps_ms[1]:.1f} beside them"
            )
            assert max(first_mb, second_mb) - before_mb < 20
            assert after_mb < before_mb + 20
            await stop_reading()
            await nothing_under_way(fleet)
            again_mb = fleet.gateway.resident_mb()
            print(f"G9: after 20 more {again_mb:.0f} MB")
            assert again_mb < after_mb + 4, "what they held has been kept"
            outcomes = [line["outcome"] for line in fleet.gateway_log() if line["request_id"].startswith("slow")]
            assert outcomes == ["slow_reader"] * 40
            assert fleet.experts["code"][0].state()["ended"] == {"completed": 1, "cancelled": 40}
            for connection in slow:
                connection.transport.abort()

        fleet.play(story)


def test_who_leaves_with_half_a_body_sent_leaves_nothing_of_it_behind(tmp_path: Path) -> None:
    with scene(tmp_path) as fleet:

        async def story(client: Client) -> None:
            assert (await client.complete("code")).outcome == "completed"
            whole = wire_request("/v1/completions", b" " * fleet.gateway.config.serve.limits.max_body_bytes)

            async def begin_and_leave() -> None:
                _, writer = await asyncio.open_connection("127.0.0.1", fleet.gateway.port)
                writer.write(whole[:-1000])
                await writer.drain()
                writer.close()

            await begin_and_leave()
            await nothing_under_way(fleet)
            before_mb = fleet.gateway.resident_mb()
            for _ in range(40):
                await begin_and_leave()
            await nothing_under_way(fleet)
            after_mb = fleet.gateway.resident_mb()
            print(f"40 times 4 MB that did not arrive: RSS {before_mb:.0f} -> {after_mb:.0f} MB")
            assert after_mb < before_mb + 20

        fleet.play(story)


def test_retry_after_follows_the_rate_at_which_answers_end() -> None:
    from real.gateway.admission import DrainRate

    rate = DrainRate()
    for tenth in range(600):
        rate.ended(tenth / 10)
    assert math.isclose(rate.retry_after_s(queued=100, now_s=60), 10, rel_tol=0.1)
    assert rate.retry_after_s(queued=1, now_s=60) == 1
    assert rate.retry_after_s(queued=100, now_s=600) == 60
