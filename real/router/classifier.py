"""The classifier of a fleet, as its fleet file describes it: tells what class a prompt is of.

TF-IDF and rules are quick enough for the gateway's event loop: about 0.2 ms for 500 words. An embedding takes tens of
milliseconds, in which an event loop that calls it stands still. Serve all of them with ``OMP_NUM_THREADS=1``.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Protocol

import numpy as np

from real.router.centres import Explanation
from real.router.router_file import RouterFile, read_router_file
from real.router.tfidf import TfidfClassifier
from sim import serve_spec

MAX_CHARACTERS = 2**16
"""Some 10,000 words. Of a longer prompt, the first and last half of this are classified: it bounds the time that one
prompt can take. It may change the class of such a prompt, and of no other."""

PACKAGED = files("real.router") / "data" / "router.npz"


class Classifier(Protocol):
    """Tells what class a prompt is of."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of ``classify``'s index."""

    def classify(self, text: str) -> int:
        """Return the index of the text's class. Never fails, whatever the text."""


class FittedClassifier(Classifier, Protocol):
    """One that was fitted to prompts and can say why."""

    def explain(self, text: str) -> Explanation:
        """Return the text's class, distances and the weights of its terms."""


def load_classifier(spec: serve_spec.Classifier, classes: Sequence[str]) -> Classifier:
    """Return the classifier that a fleet file asks for.

    A fitted classifier may know more classes than the fleet has: a prompt of one that the fleet lacks goes to the
    nearest of those it has. It may not know fewer.

    Args:
        spec: ``serve.classifier`` of the fleet file.
        classes: the fleet's classes; ``classify`` returns an index into them.

    Raises:
        ValueError: it cannot be loaded, or does not fit the classes; in one line.
    """
    if isinstance(spec, serve_spec.RuleClassifier):
        return Bounded(RuleClassifier(spec.rules, spec.otherwise, classes))
    content = read_packaged() if spec.file is None else read_router_file(Path(spec.file))
    source = spec.file or "the packaged classifier"
    if content.kind != spec.kind:
        raise ValueError(f"serve.classifier: kind is {spec.kind}, but {source} is of kind {content.kind}")
    return Bounded(fitted_classifier(content, source, classes))


def read_packaged() -> RouterFile:
    """Return the classifier that comes with the package."""
    with as_file(PACKAGED) as path:
        return read_router_file(path)


def fitted_classifier(content: RouterFile, source: str, classes: Sequence[str] | None = None) -> FittedClassifier:
    """Return the classifier of a file, for these classes or for all that it knows.

    Raises:
        ValueError: it does not know one of the classes, or its model is missing or another one.
    """
    centres = content.centres if classes is None else content.centres.of_classes(classes, source)
    if content.table is not None:
        return TfidfClassifier(content.vocabulary, content.table, centres)
    from real.router.embedding import PROBE, Embedder, EmbeddingClassifier

    assert content.model is not None
    assert content.probe is not None
    embedder = Embedder(content.model)
    probe = embedder([PROBE])[0]
    if len(probe) != len(content.probe) or np.abs(probe - content.probe).max() > 1e-3:
        raise ValueError(
            f"{source}: was fitted on another model than the {content.model} that is installed; fit it anew"
        )
    return EmbeddingClassifier(embedder, centres)


class Bounded:
    """A classifier that reads the beginning and the end of prompts longer than ``MAX_CHARACTERS``."""

    def __init__(self, inner: Classifier) -> None:
        self.inner = inner

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of ``classify``'s index."""
        return self.inner.class_names

    def classify(self, text: str) -> int:
        """Return the index of the text's class."""
        if len(text) > MAX_CHARACTERS:
            half = MAX_CHARACTERS // 2
            text = f"{text[:half]}\n{text[-half:]}"
        return self.inner.classify(text)


class RuleClassifier:
    """Gives a prompt the first class one of whose regular expressions is found in it.

    Case counts unless an expression starts with ``(?i)``. Python's expressions backtrack: one with a repetition within
    a repetition, such as ``(a+)+b``, can take hours on a text made for it, and while it does the gateway stands still.
    Anybody who sends prompts can send such a text, so keep to words, alternatives and single repetitions.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]], otherwise: str, classes: Sequence[str]) -> None:
        """Compile the rules.

        Raises:
            ValueError: a class is not the fleet's, or an expression is not one.
        """
        self.class_names = tuple(classes)
        for name, path in [*((name, f"rules.{name}") for name in rules), (otherwise, "otherwise")]:
            if name not in self.class_names:
                known = ", ".join(self.class_names)
                raise ValueError(f"serve.classifier.{path}: unknown class {name!r}, the fleet has {known}")
        self._rules = [
            (self.class_names.index(name), _compiled(pattern, f"serve.classifier.rules.{name}[{i}]"))
            for name, patterns in rules.items()
            for i, pattern in enumerate(patterns)
        ]
        self._otherwise = self.class_names.index(otherwise)

    def classify(self, text: str) -> int:
        """Return the index of the text's class."""
        return next((index for index, pattern in self._rules if pattern.search(text)), self._otherwise)


def _compiled(pattern: str, path: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {pattern!r} is not a regular expression: {error}") from error
