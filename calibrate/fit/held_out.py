"""Fits that have not seen what they predict: an experiment, a GPU or a model left out."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log2, nan

import numpy as np

from calibrate.fit.experts import ExpertKey, key_of
from calibrate.fit.fit import Calibration, fit
from calibrate.fit.observations import Observation, observe
from calibrate.fit.parameters import V0, EngineGroup, group_of
from calibrate.tables.measured_runs import MeasuredRun
from calibrate.tables.run_engine import shape_of
from sim.factors import Factors


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
    runs: Iterable[MeasuredRun],
    group: EngineGroup,
    unit: Callable[[MeasuredRun], str] = lambda run: run.exp,
    factors: Factors | None = None,
) -> HeldOut:
    """Return each observation of a group with the relative error of the fit to the runs of all other units.

    Args:
        runs: as ``fit`` takes them.
        group: what does not tell of its overheads without the unit is left out.
        unit: what a run belongs to that is left out as a whole; by default its experiment.
        factors: as ``fit`` takes them.
    """
    observations = _observations(runs, group, factors)
    errors: list[tuple[Observation, float]] = []
    for name in sorted({unit(seen.run) for seen in observations if seen.group is group}):
        others = [seen.run for seen in observations if unit(seen.run) != name]
        if not any(group_of(run) is group for run in others):
            continue
        value = fit(others, resamples=0, kernels=group.kernels, factors=factors).parameters()
        errors += [
            (seen, float(seen.terms @ value / seen.measured_s - 1))
            for seen in observations
            if seen.group is group and unit(seen.run) == name
        ]
    return errors


def quantization_errors(
    runs: Iterable[MeasuredRun], group: EngineGroup, quantization: str, factors: Factors | None = None
) -> HeldOut:
    """Return the errors on a group's runs in one quantization, of a fit that saw none of it, nor of FP8 KV.

    Args:
        runs: as ``fit`` takes them.
        group: of the runs.
        quantization: name of the catalogue.
        factors: as ``fit`` takes them.
    """

    def unit(run: MeasuredRun) -> str:
        return "left out" if run.kv_dtype or shape_of(run)[1].name == quantization else run.exp

    errors = held_out_errors(runs, group, unit, factors)
    return [(seen, error) for seen, error in errors if shape_of(seen.run)[1].name == quantization]


def error_growth(runs: Iterable[MeasuredRun], group: EngineGroup, factors: Factors | None = None) -> float:
    """Return by how much of itself a group's error grows with each doubling of the batch beyond the fitted range.

    The fit sees batches up to 8, 16, 32 and so on. Its errors on larger ones, over the mean held-out error among those
    it saw, are ``1 + growth * doublings`` by least squares. NaN where no batch is larger than those of FEWEST_INSIDE
    experiments.

    Args:
        runs: as ``fit`` takes them.
        group: whose batches are cut; of other groups the fit sees everything.
        factors: as ``fit`` takes them.
    """
    observations = _observations(runs, group, factors)
    mine = [seen for seen in observations if seen.group is group]
    points: list[tuple[float, float]] = []
    cut = SMALLEST_CUT
    while mine and cut < max(seen.decodes for seen in mine):
        small = [seen.run for seen in observations if seen.group is not group or seen.decodes <= cut]
        within = [seen for seen in mine if seen.decodes <= cut]
        if len({seen.run.exp for seen in within}) >= FEWEST_INSIDE:
            usual = float(np.mean([abs(error) for _, error in held_out_errors(small, group, factors=factors)]))
            parameters = fit(small, resamples=0, kernels=group.kernels, factors=factors).parameters()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutErrors:
    """Errors on what a fit had not seen: experiments, or all runs on a GPU or of a model.

    Attributes:
        growth: ``error_growth`` of batches beyond the fitted range; NaN where it could not be measured.
        by_quantization: ``quantization_errors`` of quantizations that no engine of the group was measured in, on the
            V0 engines that were.
    """

    by_experiment: HeldOut
    by_gpu: HeldOut
    by_model: HeldOut
    growth: float
    by_quantization: Mapping[str, HeldOut] = field(default_factory=dict)

    def like(self, key: ExpertKey, measured: Collection[ExpertKey]) -> tuple[HeldOut, str]:
        """Return the errors of predictions as far from any measurement as an expert's, and what they are of.

        Raises:
            ValueError: fewer than two experiments were measured, so that there are no errors.
        """
        model, _, gpu, _ = key
        if all(gpu != other[2] for other in measured):
            found, what = self.by_gpu, "GPUs that the fit had not seen"
        elif all(model != other[0] for other in measured):
            found, what = self.by_model, "models that the fit had not seen"
        else:
            found, what = (), ""
        if not found:
            found, what = self.by_experiment, "experiments that the fit had not seen"
        if not found:
            raise ValueError("one experiment alone cannot tell the error of a prediction: measure at least two")
        on_gpu = [(seen, error) for seen, error in found if shape_of(seen.run)[2].name == gpu]
        return on_gpu or found, what


def find_held_out_errors(
    runs: Sequence[MeasuredRun], group: EngineGroup, factors: Factors | None = None
) -> HeldOutErrors:
    """Leave out each experiment, each GPU and each model in turn, and return the errors on what was left out."""
    return HeldOutErrors(
        by_experiment=held_out_errors(runs, group, factors=factors),
        by_gpu=held_out_errors(runs, group, lambda run: shape_of(run)[2].name, factors),
        by_model=held_out_errors(runs, group, lambda run: shape_of(run)[0].name, factors),
        growth=error_growth(runs, group, factors),
        by_quantization=_on_older_engines(runs, group, factors),
    )


def _on_older_engines(runs: Sequence[MeasuredRun], group: EngineGroup, factors: Factors | None) -> dict[str, HeldOut]:
    seen = {each.group: set[str]() for each in map(observe, runs) if not isinstance(each, str)}
    for each in map(observe, runs):
        if not isinstance(each, str):
            seen[each.group].add(key_of(each.run)[1])
    missing = seen.get(V0, set()) - seen.get(group, set())
    errors = {name: quantization_errors(runs, V0, name, factors) for name in sorted(missing)}
    return {name: found for name, found in errors.items() if found}


def _observations(runs: Iterable[MeasuredRun], group: EngineGroup, factors: Factors | None) -> list[Observation]:
    """Return what runs of a group's generation of kernels say."""
    seen = [observe(run, factors) for run in runs]
    return [each for each in seen if not isinstance(each, str) and each.group.kernels == group.kernels]
