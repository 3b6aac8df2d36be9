import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sim.replica_health import ReplicaHealth, State
from sim.serve_spec import HealthSpec
from tests.kit.client import Client
from tests.kit.processes import until
from tests.kit.scene import scene


def in_rotation() -> ReplicaHealth:
    health = ReplicaHealth(HealthSpec())
    health.begin(True)
    return health


def on_trial() -> tuple[ReplicaHealth, int]:
    """A replica on trial, at second 12, and the epoch of an answer that began before it went out."""
    health = in_rotation()
    old = health.sent()
    health.failed(health.sent(), 10.0)
    health.checked(True, 11.0)
    health.checked(True, 12.0)
    assert (health.state, health.ejections) == (State.TRIAL, 1)
    return health, old


def everything(health: ReplicaHealth) -> dict[str, object]:
    return {name: getattr(health, name) for name in ReplicaHealth.__slots__}


def test_a_failed_replica_comes_back_after_good_checks_and_one_good_answer() -> None:
    health = in_rotation()
    health.failed(health.sent(), now_s=10.0)
    health.checked(True, 10.5)
    health.checked(True, 10.9)
    assert not health.usable  # the wait is 1 s
    health.checked(True, 11.5)
    assert (health.state, health.open) == (State.TRIAL, True)
    trial = health.sent()
    assert not health.open  # one request tries it, the others wait
    health.answered(trial, 11.6)
    assert health.state is State.IN


def test_each_failed_trial_doubles_the_wait_up_to_half_a_minute() -> None:
    health = in_rotation()
    waits_s, now_s = [], 0.0
    health.failed(health.sent(), now_s)
    for _ in range(7):
        failed_s = now_s
        while health.state is State.OUT:
            now_s += 1.0
            health.checked(True, now_s)
        waits_s.append(now_s - failed_s)
        health.failed(health.sent(), now_s)
    assert waits_s == [2, 2, 4, 8, 16, 30, 30]  # the first: two good checks take 2 s


def test_checks_missed_in_a_row_take_a_replica_out_and_4xx_never() -> None:
    health = in_rotation()
    for ok in (False, True, False):
        health.checked(ok, 1.0)
    assert health.state is State.IN
    health.checked(False, 2.0)
    assert (health.state, health.ejections) == (State.OUT, 1)


def test_server_errors_in_a_row_take_a_replica_out() -> None:
    health = in_rotation()
    epoch = health.sent()
    for _ in range(4):
        health.answered(epoch, 1.0)  # a first byte, and then it breaks off
        health.server_error(epoch, 1.0)
    health.completed(epoch)
    for _ in range(4):
        health.answered(epoch, 1.0)
        health.server_error(epoch, 1.0)
    assert health.usable
    health.server_error(epoch, 1.0)
    assert not health.usable


# ------------------------------------------------------------------------- answers that began before it went out


def test_a_late_success_does_not_bring_a_replica_back() -> None:
    health, old = on_trial()
    health.answered(old, 12.1)
    health.completed(old)
    assert (health.state, health.usable) == (State.TRIAL, True)
    health.server_error(health.sent(), 12.2)
    assert not health.usable


def test_a_late_failure_neither_takes_it_out_again_nor_doubles_the_wait() -> None:
    health, old = on_trial()
    trial = health.sent()
    health.failed(old, 12.1)
    for _ in range(9):
        health.server_error(old, 12.1)
    assert (health.state, health.ejections) == (State.TRIAL, 1)
    health.answered(trial, 12.2)
    for _ in range(9):
        health.server_error(old, 12.3)
    assert health.state is State.IN
    health.failed(health.sent(), 13.0)
    assert health.retry_after_s(13.0) == HealthSpec().reopen_s


def test_the_end_of_an_old_answer_lets_no_second_request_try() -> None:
    health, old = on_trial()
    trial = health.sent()
    health.over(old)
    assert not health.open
    health.over(trial)  # its client left
    assert health.open


def test_what_becomes_of_the_request_on_trial_after_its_first_byte_counts_on() -> None:
    health, _ = on_trial()
    trial = health.sent()
    health.answered(trial, 12.1)
    for _ in range(4):
        health.server_error(health.sent(), 12.2)
    assert health.usable
    health.server_error(trial, 12.3)
    assert not health.usable


def test_a_request_on_trial_that_hangs_does_not_keep_a_dead_replica_usable() -> None:
    health, _ = on_trial()
    trial = health.sent()
    health.checked(False, 13.0)
    assert health.state is State.TRIAL
    health.checked(False, 14.0)
    assert (health.state, health.retry_after_s(14.0)) == (State.OUT, 2 * HealthSpec().reopen_s)
    before = everything(health)
    health.failed(trial, 15.0)
    health.over(trial)
    assert everything(health) == before


@given(steps=st.lists(st.tuples(st.sampled_from(["send", "good", "bad", "check", "miss", "end"]), st.integers(0, 20))))
def test_only_requests_of_the_present_epoch_change_anything(steps: list[tuple[str, int]]) -> None:
    health = in_rotation()
    under_way: list[int] = []
    for now, (action, pick) in enumerate(steps):
        now_s = float(now)
        if action == "send" and health.open:
            under_way.append(health.sent())
        elif action in ("check", "miss"):
            health.checked(action == "check", now_s)
        elif action in ("good", "bad", "end") and under_way:
            epoch = under_way[pick % len(under_way)]
            before = everything(health)
            if action == "good":
                health.answered(epoch, now_s)
                health.completed(epoch)
            elif action == "bad":
                health.failed(epoch, now_s)
            else:
                under_way.remove(epoch)
                health.over(epoch)
            assert epoch == before["ejections"] or everything(health) == before


def test_an_answer_from_before_does_not_decide_the_trial_of_a_real_replica(tmp_path: Path) -> None:
    with scene(tmp_path) as fleet:
        expert = fleet.experts["code"][0]

        async def story(client: Client) -> None:
            old = asyncio.create_task(client.complete("code", max_tokens=3, mock={"ttft_s": 4.0}))
            await until(lambda: expert.state()["running"] == 1)
            failed = [await client.complete("code", mock={"status": 500}) for _ in range(5)]
            assert {reply.status for reply in failed} == {500}
            assert (await client.complete("code")).status == 503
            while (await client.request("/ready")).status != 200:
                await asyncio.sleep(0.05)
            assert not old.done(), "on trial before the old answer"
            assert (await old).outcome == "completed"
            assert (await client.complete("code", mock={"status": 500})).status == 500
            assert (await client.complete("code")).status == 503, "the trial has failed: it was no fifth error in a row"
            await until(lambda: fleet.gateway.total("ejections_total") == 2)

        fleet.play(story)
        fleet.check_ledger()
