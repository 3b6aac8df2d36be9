"""Fits that have not seen what they predict: an experiment, a GPU or a model left out."""

from collections.abc import Callable, Iterable, Sequence

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
