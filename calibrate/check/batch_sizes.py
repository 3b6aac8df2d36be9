"""How many requests an engine's iterations hold, as shares of iterations."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BATCH_BINS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513)
"""First batch size of each bin; the last is open."""


def batch_shares(sizes: NDArray[np.int64]) -> list[float]:
    """Return the share of iterations in each bin; NaN without iterations."""
    if not len(sizes):
        return [float("nan")] * len(BATCH_BINS)
    place = np.searchsorted(BATCH_BINS, sizes, side="right") - 1
    return [float(share) for share in np.bincount(place, minlength=len(BATCH_BINS)) / len(sizes)]


def bin_labels(bins: Sequence[int]) -> list[str]:
    """Return ``1``, ``2``, ``3-4`` and so on."""
    labels = [str(low) if low == high - 1 else f"{low}-{high - 1}" for low, high in pairwise(bins)]
    return [*labels, f"{bins[-1]}+"]
