import asyncio
import math
import signal
from itertools import pairwise
from pathlib import Path

from tests.kit.client import Client
from tests.kit.deaths import kill_one_of_four
from tests.kit.processes import CLASSES, until
from tests.kit.scene import scene


def test_g1_g2_a_killed_expert_takes_down_its_own_streams_and_says_so(tmp_path: Path) -> None:
    with scene(tmp_path, dict.fromkeys(CLASSES, 1), {"ttft_s": 0.05, "itl_s": 0.05}) as fleet:

        async def story(client: Client) -> None:
            death = await kill_one_of_four(fleet, client, streams=100, tokens=60)
            assert {reply.outcome for reply in death.others} == {"completed"}
            assert {reply.body.count(b'"text": " word') for reply in death.others} == {60}
            assert death.told == len(death.dead) == 25
            assert death.told_within_s < 1.0
            assert {line["status"] for line in death.asked} <= {502, 503}
            assert all(int(line["retry_after"]) >= 1 for line in death.asked)
            first_ms, slowest_ms = death.asked[0]["took_s"] * 1e3, max(line["took_s"] for line in death.asked) * 1e3
            print(f"G2: all 25 error events within {death.told_within_s * 1e3:.0f} ms")
            print(f"G2: next request refused in {first_ms:.1f} ms; of {len(death.asked)}, at most {slowest_ms:.1f} ms")
            assert first_ms < 500

        fleet.play(story)
        outcomes = fleet.check_ledger()
        assert outcomes["completed"] == 75
        assert outcomes["failed: error event"] == 25


def test_g3_an_expert_that_comes_back_is_used_again_without_a_herd(tmp_path: Path) -> None:
    with scene(tmp_path, {"code": 4}, {"ttft_s": 0.2}) as fleet:

        async def story(client: Client) -> None:
            stop = asyncio.Event()

            async def user() -> None:
                while not stop.is_set():
                    await client.complete("code", max_tokens=2)

            users = [asyncio.create_task(user()) for _ in range(40)]
            await asyncio.sleep(1)
            await asyncio.to_thread(fleet.experts["code"][2].kill)
            await asyncio.sleep(1.5)
            back_s = asyncio.get_running_loop().time()
            await asyncio.to_thread(fleet.restart, "code", 2)
            fresh = fleet.experts["code"][2]
            took_s = await until(lambda: fresh.state()["prompts"] > 1)
            print(f"G3: in rotation {asyncio.get_running_loop().time() - back_s:.2f} s after its start")
            assert took_s < 3.0
            await asyncio.sleep(2)
            stop.set()
            await asyncio.gather(*users)

        fleet.play(story)
        assert fleet.check_ledger()["completed"] > 100
        starts = [line for line in fleet.expert_logs()["code-2"] if line["what"] == "start"]
        first_s = next(now["s"] for before, now in pairwise(starts) if now["s"] - before["s"] > 1.0)
        everyone = [line["s"] for log in fleet.expert_logs().values() for line in log if line["what"] == "start"]
        slow = range(1, 11)  # tenths of the first second
        own = [sum(first_s <= line["s"] < first_s + tenth / 10 for line in starts) for tenth in slow]
        total = [sum(first_s <= s < first_s + tenth / 10 for s in everyone) for tenth in slow]
        print(f"G3: {own[-1]} of {total[-1]} requests in its first second")
        assert own[-1] <= total[-1] / 4 + 5


def test_g4_a_stalled_expert_is_left_before_its_first_byte_and_reported_after(tmp_path: Path) -> None:
    timeouts = {"first_byte_s": 0.6, "idle_s": 0.8}
    with scene(tmp_path, {"code": 2}, {"itl_s": 0.05}, timeouts=timeouts) as fleet:

        async def story(client: Client) -> None:
            streams = [asyncio.create_task(client.complete("code", max_tokens=100)) for _ in range(10)]
            await asyncio.sleep(0.6)
            stalled, other = fleet.experts["code"]
            stalled.signal(signal.SIGSTOP)
            early = await asyncio.gather(*(client.complete("code", max_tokens=2) for _ in range(4)))
            replies = await asyncio.gather(*streams)
            for reply in early:
                assert reply.outcome == "completed"
                assert reply.headers["x-expert-router-replica"] == "1"
                assert reply.took_s < 0.6 + 1.0
            for reply in replies:
                if reply.headers["x-expert-router-replica"] == "0":
                    assert (reply.errors, reply.is_done) == (1, True)
                    silence_s = reply.ended_s - reply.times_s[-2]
                    assert 0.7 < silence_s < 0.8 + 0.5
                else:
                    assert reply.outcome == "completed"
            before = other.state()["prompts"]
            assert (await client.complete("code", max_tokens=2)).headers["x-expert-router-replica"] == "1"
            assert other.state()["prompts"] == before + 1
            assert fleet.gateway.total("ejections_total", replica="0") >= 1
            stalled.signal(signal.SIGCONT)

            async def answered_by_it() -> bool:
                reply = await client.complete("code", max_tokens=2)
                return reply.headers.get("x-expert-router-replica") == "0"

            loop = asyncio.get_running_loop()
            back_s = loop.time()
            while not await answered_by_it():
                await asyncio.sleep(0.05)
                assert loop.time() - back_s < 6
            print(f"G4: back {loop.time() - back_s:.2f} s after SIGCONT")

        fleet.play(story)
        fleet.check_ledger()


def test_g5_never_a_retry_after_a_byte_and_one_elsewhere_before(tmp_path: Path) -> None:
    with scene(tmp_path, {"code": 3}) as fleet:

        async def story(client: Client) -> None:
            replies = [await client.complete("code", mock={"cut_after": 1}) for _ in range(3)]
            assert {reply.outcome for reply in replies} == {"failed: error event"}
            assert sum(expert.state()["prompts"] for expert in fleet.all) == 3
            fleet.experts["code"][0].behave(cut_after=0)
            replies = [await client.complete("code") for _ in range(3)]
            assert {reply.outcome for reply in replies} == {"completed"}

        fleet.play(story)
        assert fleet.check_ledger() == {"failed: error event": 3, "completed": 3}
        places: dict[str, list[str]] = {}
        for name, log in fleet.expert_logs().items():
            for line in log:
                if line["what"] == "start":
                    places.setdefault(line["id"], []).append(name)
        assert all(len(set(where)) == len(where) <= 2 for where in places.values())


def test_g5_retries_keep_to_their_budget(tmp_path: Path) -> None:
    with scene(tmp_path, {"code": 6}, {"status": 500, "ttft_s": 1.0}) as fleet:

        async def story(client: Client) -> None:
            replies = await asyncio.gather(*(client.complete("code") for _ in range(200)))
            assert {reply.status for reply in replies} == {500}

        fleet.play(story)
        fleet.check_ledger()
        log = fleet.gateway_log()
        retried = [line for line in log if line["tries"] == 2]
        assert max(line["tries"] for line in log) == 2
        for line in retried:
            now_s = line["chosen_s"]  # when its second try was sent
            at_it = sum(other["chosen_s"] <= now_s < other["ended_s"] for other in retried)
            open_ = sum(other["arrived_s"] <= now_s < other["ended_s"] for other in log)
            assert at_it <= math.ceil(0.1 * open_)
        # All are open when the first fails, so a tenth of them are tried again at once, and by then most are out.
        assert len(retried) == 20
        assert sum(expert.state()["prompts"] for expert in fleet.all) == 220


def test_g6_a_storm_of_4xx_ejects_nobody(tmp_path: Path) -> None:
    with scene(tmp_path) as fleet:

        async def story(client: Client) -> None:
            direct = Client(fleet.experts["code"][0].port)
            expected = await direct.complete("code", max_tokens=0)
            direct.close()

            async def user() -> None:
                for _ in range(50):
                    reply = await client.complete("code", max_tokens=0)
                    assert (reply.status, reply.body) == (400, expected.body)

            await asyncio.gather(*(user() for _ in range(20)))
            assert (await client.complete("code")).outcome == "completed"
            assert fleet.gateway.total("ejections_total") == 0
            assert fleet.gateway.total("requests_total", outcome="client_error") == 1000

        fleet.play(story)


def test_an_answer_never_ends_in_silence(tmp_path: Path) -> None:
    faults = {"end_after": "no_done", "error_after": "expert_error", "cut_after": "reset"}
    with scene(tmp_path) as fleet:

        async def story(client: Client) -> None:
            for fault in faults:
                reply = await client.complete("code", mock={fault: 3})
                assert (reply.end, reply.errors, reply.is_done) == ("clean", 1, True)
                assert reply.body.count(b'"text"') == 3
            assert (await client.complete("code", mock={"status": 500})).status == 500
            whole = await client.complete("code", stream=False, mock={"cut_after": 0})
            assert (whole.status, whole.json["error"]["code"]) == (502, 502)

        fleet.play(story)
        fleet.check_ledger()
        assert [line["outcome"] for line in fleet.gateway_log()] == [*faults.values(), "expert_error", "reset"]


def test_the_longest_time_for_an_answer_is_kept(tmp_path: Path) -> None:
    with scene(tmp_path, behaviour={"itl_s": 0.05}, timeouts={"total_s": 1.0}) as fleet:

        async def story(client: Client) -> None:
            reply = await client.complete("code", max_tokens=1000)
            assert (reply.errors, reply.is_done) == (1, True)
            assert 0.9 < reply.took_s < 2

        fleet.play(story)
        assert [line["outcome"] for line in fleet.gateway_log()] == ["total_timeout"]


def test_a_silence_between_chunks_has_its_own_limit_however_long_the_first_may_take(tmp_path: Path) -> None:
    with scene(tmp_path, behaviour={"itl_s": 0.05}, timeouts={"first_byte_s": 30.0, "idle_s": 0.5}) as fleet:

        async def story(client: Client) -> None:
            late = await client.complete("code", max_tokens=2, mock={"ttft_s": 1.5, "late_head": True})
            assert late.outcome == "completed"
            reply = await client.complete("code", max_tokens=10, mock={"hang_after": 3})
            assert (reply.errors, reply.is_done) == (1, True)
            assert 0.5 < reply.took_s < 3

        fleet.play(story)
        assert [line["outcome"] for line in fleet.gateway_log()] == ["completed", "idle_timeout"]
