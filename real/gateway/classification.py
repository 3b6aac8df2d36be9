"""The classifier at work in a gateway: in line for the usual prompt, in a process of its own for a very long one.

A long text would hold up every stream of the worker, and a thread does not spare it: the interpreter lock is shared.
An embedding takes tens of milliseconds for any text, so it always goes there.
"""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING

from real.processes.parent_death import die_with_parent
from sim.serve_spec import Classifier as ClassifierSpec

if TYPE_CHECKING:
    from real.router.classifier import Classifier

INLINE_CHARACTERS = 16_000
"""Longest text classified in line: about 2,500 words, about 1 ms."""

_classifier: "Classifier | None" = None  # of a helper process


class ClassifierBusyError(Exception):
    """Too many prompts wait for the helper process, this one has waited too long, or it cannot be started."""


class Classification:
    """The class of each prompt."""

    def __init__(self, spec: ClassifierSpec, classes: Sequence[str], *, most_waiting: int, longest_s: float) -> None:
        """Load the classifier.

        Args:
            spec: which.
            classes: of the fleet.
            most_waiting: prompts that may wait for the helper process at a time.
            longest_s: that each of them may.

        Raises:
            ValueError: it cannot be loaded, or does not know these classes.
        """
        from real.router.classifier import load_classifier

        self._spec = spec
        self._classes = tuple(classes)
        self._classifier = load_classifier(spec, self._classes)
        self._inline_characters = -1 if spec.kind == "embedding" else INLINE_CHARACTERS
        self._pool: ProcessPoolExecutor | None = None
        self._most_waiting = most_waiting
        self._longest_s = longest_s
        self._waiting = 0

    async def classify(self, text: str) -> int:
        """Return the index of the text's class.

        Raises:
            ClassifierBusyError: see there; never for a text that is classified in line.
        """
        if len(text) <= self._inline_characters:
            return self._classifier.classify(text)
        if self._waiting >= self._most_waiting:
            raise ClassifierBusyError
        self._waiting += 1
        try:
            async with asyncio.timeout(self._longest_s):
                try:
                    return await self._elsewhere(text)
                except BrokenProcessPool:  # it was killed: once more, in a new one
                    self.close()
                    return await self._elsewhere(text)
        except TimeoutError:
            raise ClassifierBusyError from None
        except OSError:  # no file descriptor or process is left for it
            self.close()
            raise ClassifierBusyError from None
        finally:
            self._waiting -= 1

    async def _elsewhere(self, text: str) -> int:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=_begin, initargs=(os.getpid(), self._spec, self._classes)
            )
        safe = text.encode("utf-8", "surrogatepass")
        return await asyncio.get_running_loop().run_in_executor(self._pool, _classify, safe)

    def close(self) -> None:
        """End the helper process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _begin(parent_pid: int, spec: ClassifierSpec, classes: tuple[str, ...]) -> None:
    global _classifier
    from real.router.classifier import load_classifier

    die_with_parent(parent_pid)
    _classifier = load_classifier(spec, classes)


def _classify(text: bytes) -> int:
    assert _classifier is not None
    return _classifier.classify(text.decode("utf-8", "surrogatepass"))
