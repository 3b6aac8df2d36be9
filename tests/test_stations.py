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
