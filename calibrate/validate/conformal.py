"""Prediction intervals from the errors of other experiments (split conformal prediction on log errors)."""

from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray


def interval_factors(
    absolute_log_errors: NDArray[np.float64],
    experiments: Sequence[str],
    coverage: float,
    widening: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Return for each row the factor q such that ``prediction / q .. prediction * q`` has this coverage.

    Row i is judged by the rows of other experiments only. Runs of one experiment share a server and err together, so
    each experiment has weight 1, split evenly over its rows, and the row's own experiment stands for one more error of
    unknown size: the smallest error that at least ``coverage`` of the weight, itself included, does not exceed. That is
    the finite-sample quantile ceil((n + 1) * coverage) of n exchangeable experiments (Vovk, Gammerman and Shafer 2005;
    for groups: Dunn, Wasserman and Ramdas 2023). With too few experiments the factor is infinite.

    Args:
        absolute_log_errors: shape (n,), ``abs(log(measured / predicted))``.
        experiments: of each row.
        coverage: between 0 and 1.
        widening: shape (n,), how large each row's error is thought to be relative to others; None: all alike. Errors
            are ranked in these units (normalised conformal prediction, Papadopoulos, Gammerman and Vovk 2008), which
            keeps the coverage whatever the units: a row twice as wide gets a factor of ``q ** 2``.
    """
    units = np.ones_like(absolute_log_errors) if widening is None else widening
    scores = absolute_log_errors / units
    names, group = np.unique(np.array(experiments, dtype=str), return_inverse=True)
    weight = 1 / np.bincount(group)[group]
    order = np.argsort(scores, kind="stable")
    needed = coverage * len(names)  # the others, and the own one for itself
    by_group = {}
    for own in range(len(names)):
        others = order[group[order] != own]
        reached = np.cumsum(weight[others]) >= needed - 1e-9
        by_group[own] = float(np.exp(scores[others[np.argmax(reached)]])) if reached.any() else inf
    return np.asarray(np.array([by_group[own] for own in group.tolist()], dtype=np.float64) ** units)
