"""Class centres: which class a point is nearest to, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TermWeight:
    """How much a term of a prompt speaks for the chosen class against the next best, and how often it occurs."""

    term: str
    count: int
    weight: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a prompt got its class.

    The weights of all terms and ``bias`` add up to ``margin``, half the difference of the squared distances to the
    next best class and to the chosen one. ``bias`` is what the centres' own lengths contribute, whatever the prompt.
    ``terms`` is empty for a classifier that does not look at single terms, and for a prompt of unknown words.
    """

    class_name: str
    next_best: str | None
    distances: dict[str, float]
    margin: float
    bias: float
    terms: tuple[TermWeight, ...]


class Centres:
    """One centre per class, in the classes' order. Points and centres are rows of the same space."""

    def __init__(self, class_names: Sequence[str], vectors: NDArray[np.floating]) -> None:
        self.class_names = tuple(class_names)
        self.vectors = vectors
        # |p - c|^2 = |p|^2 - 2 (p.c - |c|^2 / 2): the nearest centre has the largest bracket.
        self.half_squares = (vectors * vectors).sum(axis=1) / 2

    def nearest(self, point: NDArray[np.floating]) -> int:
        """Return the index of the nearest class; of equally near ones, the first."""
        return int((self.vectors @ point - self.half_squares).argmax())

    def distances(self, point: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the distance of a point to each centre."""
        distances: NDArray[np.floating] = np.linalg.norm(self.vectors - point, axis=1)
        return distances

    def of_classes(self, classes: Sequence[str], source: str) -> "Centres":
        """Return the centres of these classes, in this order; a prompt of another class then goes to the nearest.

        Raises:
            ValueError: there is no centre for one of them.
        """
        unknown = [name for name in classes if name not in self.class_names]
        if unknown:
            raise ValueError(
                f"{source}: knows no class {', '.join(map(repr, unknown))}, only {', '.join(self.class_names)}; "
                "rename the fleet's classes, or fit a classifier on prompts of these classes (expert-router router fit)"
            )
        rows = [self.class_names.index(name) for name in classes]
        return Centres(classes, self.vectors[rows])

    def explain(
        self, point: NDArray[np.floating], parts: Sequence[tuple[str, int, NDArray[np.floating]]]
    ) -> Explanation:
        """Explain a point.

        Args:
            point: what is classified.
            parts: (term, count, vector) whose vectors add up to the point.
        """
        distances = self.distances(point)
        order = np.argsort(-(self.vectors @ point - self.half_squares), kind="stable")
        chosen = int(order[0])
        if len(order) > 1:
            other = int(order[1])
            direction = self.vectors[chosen] - self.vectors[other]
            bias = float(self.half_squares[other] - self.half_squares[chosen])
            next_best = self.class_names[other]
        else:
            direction, bias, next_best = self.vectors[chosen], float(-self.half_squares[chosen]), None
        weights = [TermWeight(term, count, float(vector @ direction)) for term, count, vector in parts]
        return Explanation(
            class_name=self.class_names[chosen],
            next_best=next_best,
            distances={self.class_names[i]: float(distances[i]) for i in order},
            margin=float(point @ direction) + bias,
            bias=bias,
            terms=tuple(sorted(weights, key=lambda each: (-abs(each.weight), each.term))),
        )
