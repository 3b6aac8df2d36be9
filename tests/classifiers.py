"""Small classifiers and prompts for tests, fitted once."""

from functools import cache

from real.router.classifier_fit import RouterFit
from real.router.labelled_prompts import LabelledPrompts, read_packaged_prompts


@cache
def packaged_prompts() -> LabelledPrompts:
    return read_packaged_prompts()


def labels() -> tuple[str, ...]:
    found = packaged_prompts().labels
    assert found is not None
    return found


@cache
def halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return every other prompt, to fit to, and the rest, held out."""
    texts = packaged_prompts().texts
    return texts[::2], texts[1::2]


@cache
def fit_of_half() -> RouterFit:
    return RouterFit(centres="labels").fit(halves()[0], labels()[::2])


@cache
def clusters_of_half() -> RouterFit:
    return RouterFit(classes=4).fit(halves()[0])
