"""The router's token stream on cases small enough to do by hand."""

import pytest

from sim.stations import RouterStation
from tests.fleets import FREE_ROUTER


def station(workers: int = 1) -> RouterStation:
    """A request takes a second, a token a hundredth."""
    changes = {"per_request_s": 1.0, "per_output_token_s": 0.01, "workers": workers}
    return RouterStation(FREE_ROUTER.model_copy(update=changes), lambda: 1.0)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_streamed_tokens_take_as_much_of_every_worker(workers: int) -> None:
    router = station(workers)
    router.change_token_rate(0.0, 50.0 * workers)  # half the time of each
    for _ in range(workers):
        assert router.take_request(0.0, 1) == (0.0, 1.0)
    assert router.take_request(1.0, 1) == (1.5, 2.5)  # half a second of each is still to do
    assert router.busy_until(4.0) == workers + 1 + 4.0 * 0.5 * workers


def test_more_tokens_than_an_idle_router_can_pass_on_pile_up() -> None:
    router = station()
    router.change_token_rate(5.0, 150.0)
    assert router.busy_until(9.0) == 4.0
    assert router.take_request(9.0, 1) == (11.0, 12.0)  # 6 s of work came in 4 s


@pytest.mark.parametrize("tokens", [1, 2, 5, 100])
def test_tokens_that_come_together_are_passed_on_one_by_one(tokens: int) -> None:
    one_by_one_s = [0.01 * (place + 1) for place in range(tokens)]
    assert station().token_delay_s(0.0, 0.0, tokens) == pytest.approx(sum(one_by_one_s) / tokens)


def test_tokens_wait_for_the_mean_backlog_of_all_workers() -> None:
    router = station(2)
    assert router.take_request(0.0, 1) == (0.0, 1.0)
    assert router.token_delay_s(0.0, 0.0, 1) == pytest.approx((1.0 + 0.0) / 2 + 0.01)


# ------------------------------------------------------------------------------------------------------- wake-ups


def sleepy(workers: int = 1, per_output_token_s: float = 0.01) -> RouterStation:
    """A request takes a second, and half a second more where it wakes a worker."""
    changes = {"per_request_s": 1.0, "per_output_token_s": per_output_token_s, "per_wake_up_s": 0.5, "workers": workers}
    return RouterStation(FREE_ROUTER.model_copy(update=changes), lambda: 1.0)


def test_only_what_meets_an_idle_worker_wakes_it() -> None:
    router = sleepy()
    assert router.take_request(0.0, 1) == (0.0, 1.5)
    assert router.take_request(1.0, 1) == (1.5, 2.5)
    assert router.take_request(2.5, 1) == (2.5, 4.0)
    assert router.busy_until(9.0) == 4.0


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("burst", [1, 2, 8, 64])
def test_tokens_that_come_together_wake_each_worker_once(workers: int, burst: int) -> None:
    router = sleepy(workers, per_output_token_s=1e-3)
    bursts_per_s = 1e-3
    tokens_per_s = bursts_per_s * burst
    router.change_token_rate(0.0, tokens_per_s, router.wake_ups_per_s(tokens_per_s, burst))
    work_s = router.busy_until(1e3)  # of one burst, on average
    # But for the little that tokens keep it awake.
    assert work_s == pytest.approx(burst * 1e-3 + min(burst, workers) * 0.5, rel=1e-2)
    delay_s = router.token_delay_s(1e3, 0.0, burst)
    assert delay_s == pytest.approx(0.5 + 1e-3 * (1 + (burst - 1) / (2 * workers)), rel=1e-2)


def test_a_worker_that_tokens_keep_awake_is_not_woken() -> None:
    router = sleepy()
    router.change_token_rate(0.0, 50.0, router.wake_ups_per_s(50.0, 5))  # half its time, and 10 wake-ups a second
    # u = 0.5 + 10 * 0.5 * (1 - u)
    assert router.busy_until(1.0) == pytest.approx(5.5 / 6)
    assert router.take_request(1.0, 1) == pytest.approx((1.0, 2.0 + 0.5 * 0.5 / 6))
    router.change_token_rate(1.0, 100.0, router.wake_ups_per_s(100.0, 5))
    assert router.token_delay_s(1.0, 0.0, 1) > 1.0
    router.change_token_rate(1.0, -150.0, -router.wake_ups_per_s(150.0, 5))
    assert router.busy_until(9.0) - router.busy_until(8.0) == 0.0
