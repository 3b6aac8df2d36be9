"""Fits that have not seen what they predict: an experiment, a GPU or a model left out."""

from collections.abc import Callable, Iterable, Sequence
from math import log2, nan

import numpy as np

from calibrate.fit import Calibration, fit
from calibrate.measured_runs import MeasuredRun
from calibrate.observations import Observation, observe
from calibrate.parameters import EngineGroup, group_of


def leave_one_out(runs: Sequence[MeasuredRun]) -> Callable[[str], Calibration]:
    """Return a function from an experiment to the fit to all others; point estimates only, remembered."""
    known: dict[str, Calibration] = {}

    def without(experiment: str) -> Calibration:
        if experiment not in known:
            known[experiment] = fit(runs, without=(experiment,), resamples=0)
        return known[experiment]

    return without


HeldOut = Sequence[tuple[Observation, float]]
"""Observations with the relative errors of fits that had not seen them."""

SMALLEST_CUT, FEWEST_INSIDE = 8, 3
SMALLEST_ERROR = 1e-3  # a relative error that no measurement can tell from none


def held_out_errors(
    runs: Iterable[MeasuredRun], group: EngineGroup, unit: Callable[[MeasuredRun], str] = lambda run: run.exp
) -> HeldOut:
    """Return each observation of a group with the relative error of the fit to the runs of all other units.

    Args:
        runs: as ``fit`` takes them.
        group: what does not tell of its overheads without the unit is left out.
        unit: what a run belongs to that is left out as a whole; by default its experiment.
    """
    observations = [seen for seen in map(observe, runs) if not isinstance(seen, str)]
    errors: list[tuple[Observation, float]] = []
    for name in sorted({unit(seen.run) for seen in observations if seen.group is group}):
        others = [seen.run for seen in observations if unit(seen.run) != name]
        if not any(group_of(run) is group for run in others):
            continue
        value = fit(others, resamples=0).parameters()
        errors += [
            (seen, float(seen.terms @ value / seen.measured_s - 1))
            for seen in observations
            if seen.group is group and unit(seen.run) == name
        ]
    return errors


def error_growth(runs: Iterable[MeasuredRun], group: EngineGroup) -> float:
    """Return by how much of itself a group's error grows with each doubling of the batch beyond the fitted range.

    The fit sees batches up to 8, 16, 32 and so on. Its errors on larger ones, over the mean held-out error among those
    it saw, are ``1 + growth * doublings`` by least squares. NaN where no batch is larger than those of FEWEST_INSIDE
    experiments.

    Args:
        runs: as ``fit`` takes them.
        group: whose batches are cut; of other groups the fit sees everything.
    """
    observations = [seen for seen in map(observe, runs) if not isinstance(seen, str)]
    mine = [seen for seen in observations if seen.group is group]
    points: list[tuple[float, float]] = []
    cut = SMALLEST_CUT
    while mine and cut < max(seen.decodes for seen in mine):
        small = [seen.run for seen in observations if seen.group is not group or seen.decodes <= cut]
        within = [seen for seen in mine if seen.decodes <= cut]
        if len({seen.run.exp for seen in within}) >= FEWEST_INSIDE:
            usual = float(np.mean([abs(error) for _, error in held_out_errors(small, group)]))
            parameters = fit(small, resamples=0).parameters()
            largest = max(seen.decodes for seen in within)
            for seen in mine:
                if seen.decodes > cut:
                    error = abs(float(seen.terms @ parameters / seen.measured_s - 1))
                    points.append((log2(seen.decodes / largest), error / max(usual, SMALLEST_ERROR)))
        cut *= 2
    if not points:
        return nan
    doublings, ratio = np.array(points).T
    return max(0.0, float(doublings @ (ratio - 1) / (doublings @ doublings)))
