"""The classifier at work in a gateway: long texts go to a process of their own, and its line is bounded."""

import asyncio

import pytest

from real.gateway.classification import INLINE_CHARACTERS, Classification, ClassifierBusyError
from sim.serve_spec import RuleClassifier

SPEC = RuleClassifier(rules={"code": ["def "]}, otherwise="chat")
LONG = "def " + "x" * INLINE_CHARACTERS


def classification(*, most_waiting: int = 4, longest_s: float = 60.0) -> Classification:
    return Classification(SPEC, ["code", "chat"], most_waiting=most_waiting, longest_s=longest_s)


def test_long_texts_get_the_class_of_short_ones() -> None:
    async def story() -> list[int]:
        at_work = classification()
        try:
            return [await at_work.classify(text) for text in ("def f", "hello", LONG)]
        finally:
            at_work.close()

    assert asyncio.run(story()) == [0, 1, 0]


def test_too_many_long_texts_are_refused_and_short_ones_never() -> None:
    async def story() -> None:
        at_work = classification(most_waiting=1)
        try:
            first = asyncio.create_task(at_work.classify(LONG))
            await asyncio.sleep(0)
            with pytest.raises(ClassifierBusyError):
                await at_work.classify(LONG)
            assert await at_work.classify("hello") == 1
            assert await first == 0
            assert await at_work.classify(LONG) == 0, "there is room again"
        finally:
            at_work.close()

    asyncio.run(story())


def test_a_long_text_waits_only_so_long() -> None:
    async def story() -> None:
        at_work = classification(longest_s=0.001)  # starting the process alone takes longer
        try:
            with pytest.raises(ClassifierBusyError):
                await at_work.classify(LONG)
        finally:
            at_work.close()

    asyncio.run(story())
