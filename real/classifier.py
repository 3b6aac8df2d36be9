"""What a classifier is, and the labelled rule."""

import re
from collections.abc import Sequence
from typing import Protocol

from sim.serve_spec import Classifier as ClassifierSpec
from sim.serve_spec import RuleClassifier


class Classifier(Protocol):
    """Takes a text for one of some classes."""

    class_names: tuple[str, ...]

    def classify(self, text: str) -> int:
        """Return the index of the text's class."""
        ...


class Rules:
    """The first class one of whose regular expressions is found."""

    def __init__(self, spec: RuleClassifier, classes: Sequence[str]) -> None:
        self.class_names = tuple(classes)
        order = {name: index for index, name in enumerate(classes)}
        self._rules = [(re.compile("|".join(rules)), order[name]) for name, rules in spec.rules.items()]
        self._otherwise = order[spec.otherwise]

    def classify(self, text: str) -> int:
        """Return the index of the text's class."""
        return next((index for rule, index in self._rules if rule.search(text)), self._otherwise)


def load_classifier(spec: ClassifierSpec, classes: Sequence[str]) -> Classifier:
    """Return the classifier of a fleet file."""
    if not isinstance(spec, RuleClassifier):
        raise ValueError("only rules so far")
    return Rules(spec, classes)
