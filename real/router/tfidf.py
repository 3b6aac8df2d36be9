"""Classify by TF-IDF: the whole scikit-learn pipeline folded into one table, served with numpy and ``re`` alone.

The pipeline is tf-idf, truncated SVD, normalisation, nearest centre. The normalisation after the SVD undoes whatever
length the tf-idf vector had, so its own normalisation can be left out and ``idf`` multiplied into the components: with
``table = idf * components``, a prompt's point is ``counts @ table[ids]`` divided by its length. This is exact.

Serve with one BLAS thread (``OMP_NUM_THREADS=1``): the products are small, and threads make them slower.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from real.router.centres import Centres, Explanation

NUMBER = "#NUMBER"
"""The one term that stands for all tokens that start with a digit; no token looks like it."""

_TOKEN = re.compile(r"\w\w+")  # finds the same as scikit-learn's \b\w\w+\b, for it takes all letters that follow


def tokens(text: str) -> list[str]:
    """Return the terms of a text, as fitting and serving both see them: words of two letters or more, numbers alike."""
    return [NUMBER if token[0].isdigit() else token for token in _TOKEN.findall(text.lower())]


class TfidfClassifier:
    """Gives a prompt the class whose centre its words are nearest to. A prompt without a known word is the point 0."""

    def __init__(self, vocabulary: Sequence[str], table: NDArray[np.floating], centres: Centres) -> None:
        """``table`` has a row per term of the vocabulary; its precision is what is computed in."""
        self.vocabulary = tuple(vocabulary)
        self.table = table
        self.centres = centres
        self._ids = {term: i for i, term in enumerate(vocabulary)}
        self._number = self._ids.get(NUMBER)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of ``classify``'s index."""
        return self.centres.class_names

    def classify(self, text: str) -> int:
        """Return the index of the text's class."""
        return self.centres.nearest(self.point(text))

    def point(self, text: str) -> NDArray[np.floating]:
        """Return the text's point: a vector of length 1, or 0 if no word is known."""
        counts = self._counts(text)
        point: NDArray[np.floating] = self._weights(counts) @ self.table[list(counts)]
        length = np.sqrt(point @ point)
        return point / length if length > 0 else point

    def explain(self, text: str) -> Explanation:
        """Return the text's class, its distances, and the weight of each of its known terms."""
        counts = self._counts(text)
        vectors = self._weights(counts)[:, None] * self.table[list(counts)]
        total = vectors.sum(axis=0)
        length = np.sqrt(total @ total)
        if length > 0:
            vectors = vectors / length
        parts = [(self.vocabulary[i], counts[i], vector) for i, vector in zip(counts, vectors, strict=True)]
        return self.centres.explain(self.point(text), parts)

    def _counts(self, text: str) -> dict[int, int]:
        """Return the terms of a text that are known, as rows of the table, and how often each occurs."""
        counts: dict[int, int] = {}
        numbers = 0
        # Counted before they are looked up: a word that comes ten times costs one look-up. Numbers are not in the
        # vocabulary, so only words that are missing there can be one.
        for token, count in Counter(_TOKEN.findall(text.lower())).items():
            row = self._ids.get(token)
            if row is not None:
                counts[row] = count
            elif token[0].isdigit():
                numbers += count
        if numbers and self._number is not None:
            counts[self._number] = numbers
        return counts

    def _weights(self, counts: dict[int, int]) -> NDArray[np.floating]:
        return np.fromiter(counts.values(), dtype=self.table.dtype, count=len(counts))
