"""A flood of broken answers goes on a little in each turn of the event loop."""

import asyncio
import time

from real.gateway.turns import AT_LEAST, SPREAD_S, Turns


async def flood(count: int, *, turn_s: float = 0.0, leaving: int = 0) -> tuple[list[int], list[int]]:
    """Let so many come at once, of whom the last some leave; return their order, and how many went on in each turn."""
    turns, order, in_turn = Turns(), [], [0]

    async def one(index: int) -> None:
        await turns.mine(first=False)
        order.append(index)
        in_turn[-1] += 1

    tasks = [asyncio.create_task(one(index)) for index in range(count)]
    await asyncio.sleep(0)
    for task in tasks[count - leaving :]:
        task.cancel()
    while not all(task.done() for task in tasks):
        in_turn.append(0)
        time.sleep(turn_s)  # what everybody else has to do
        await asyncio.sleep(0)
    return order, in_turn


def test_who_comes_alone_does_not_wait() -> None:
    async def story() -> None:
        turns = Turns()
        for _ in range(3):
            alone = asyncio.create_task(turns.mine(first=False))
            await asyncio.sleep(0)
            assert alone.done()
            await asyncio.sleep(0.01)

    asyncio.run(story())


def test_of_a_flood_a_few_go_on_in_each_turn_in_order() -> None:
    order, in_turn = asyncio.run(flood(100))
    assert order == list(range(100))
    assert max(in_turn) <= AT_LEAST
    assert len(in_turn) >= 100 / AT_LEAST


def test_those_who_left_take_nobodys_turn() -> None:
    order, in_turn = asyncio.run(flood(100, leaving=60))
    assert order == list(range(40))
    assert len([count for count in in_turn if count]) <= 40 / AT_LEAST + 1


def test_where_turns_are_long_more_go_on_so_that_all_are_told_in_time() -> None:
    turn_s = 0.05
    order, in_turn = asyncio.run(flood(300, turn_s=turn_s))
    assert order == list(range(300))
    assert len(in_turn) <= SPREAD_S / turn_s + 4


def test_who_has_got_nothing_yet_goes_before_those_whose_answers_have_ended() -> None:
    async def story() -> list[str]:
        turns, order = Turns(), []

        async def one(name: str, *, first: bool) -> None:
            await turns.mine(first=first)
            order.append(name)

        tasks = [asyncio.create_task(one("broken", first=False)) for _ in range(100)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one("next", first=True)))
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(story()).index("next") <= 3 * AT_LEAST
