"""Fit what measured engines say of the roofline: corrections of its terms, and what each engine version adds.

The time of an iteration is linear in a few non-negative parameters. Five correct kernels whose times come from shapes
and kernel measurements: matrix products, KV reads, attention of prefill chunks, all-reduces, small kernels. They belong
to the hardware and are shared by all models, GPUs and engine versions of one generation of kernels: a model never
measured on a GPU gets a prediction from its shape. Five more belong to an engine version: host time per iteration and
per sequence, and the cost of sampling filters.

A measured mean time per output token (or median gap between tokens) is the time of a decode iteration at the measured
concurrency, plus each iteration's share of prefills. The fit minimises relative errors by non-negative least squares,
with a prior that holds the corrections near 1 by the spread of the kernel measurements, and Huber weights that keep a
single odd run from steering it (Huber 1964). Intervals are the wider of two: refits to resampled experiments, whole
experiments at a time, because the stages of one share what is odd about it; and the spread of the linear model with
known noise and prior, which holds where few experiments tell of a parameter, or none does.
"""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from calibrate.fit.front_end import front_end_delay_s
from calibrate.fit.observations import Observation, build_curve, observe
from calibrate.fit.parameters import (
    CONFIDENCE,
    CORRECTIONS,
    GROUPS,
    OVERHEADS,
    EngineGroup,
    Estimate,
    group_of,
    overhead_columns,
)
from calibrate.predictor import CannotPredictError, PredictedEngine
from calibrate.tables.measured_runs import MeasuredRun
from sim.factors import Factors, OverheadFactors, packaged_factors
from sim.fleet import FrontEnd
from sim.profile import ASSUMED_ERROR_GROWTH
from sim.roofline import Corrections, default_front_end
from sim.service_curve import CurveSource
from sim.streams import stream

PRIOR_SPREAD = {"matrix": 0.05, "kv_read": 0.1, "prefill_attention": 0.07, "all_reduce": 0.3, "small_kernels": 0.3}
"""How far a correction may plausibly lie from 1: about the errors of the kernel fits in sim/data/roofline.json
(matrix products and attention 4 to 11 %, all-reduces 1 to 16 % and fused or overlapped in some engines; small kernels
were measured on other GPUs). Serving runs hardly tell of prefill attention, so its interval is that of the measured
kernels: 7 % is the standard deviation of their logarithmic errors where pairs take more than half of the time."""
NOISE = 0.03
"""Relative error of one measured stage: repeated experiments with one model differ by 1 to 3 %."""
HUBER = 1.5
"""Residuals, in units of NOISE, beyond which a stage counts less (Huber 1964)."""
UNKNOWN_SPREAD = {
    "per_iteration_s": 1e-3,
    "per_sequence_s": 5e-5,
    "filter_fixed_s": 1e-3,
    "top_p_passes": 200.0,
    "top_k_passes": 200.0,
}
"""How far overheads may plausibly be from any value: about the largest fitted to any engine. Intervals take it as the
standard deviation before any measurement; the fit itself has no such prior, for it forbids what this rules out: of two
overheads that always occur together one far below zero, the other far above."""
RESAMPLES = 200
_NORMAL_QUANTILE = 1.645  # of a normal distribution, for CONFIDENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A fit: fulfils ``calibrate.predictor.Predictor``.

    Attributes:
        corrections: by name of CORRECTIONS.
        overheads: by engine group, then by name of OVERHEADS.
        delays_s: front-end delay of a request by engine group, where a TTFT was measured.
        observations: what it was fitted to.
        experiments: their experiments.
        left_out: reason -> how many runs of the table could not be used for fitting.
        errors: relative errors of the fit on its own observations, shape (observations,).
        factors: kernel efficiencies that the corrections are of; None: the packaged ones.
    """

    corrections: dict[str, Estimate]
    overheads: dict[EngineGroup, dict[str, Estimate]]
    delays_s: dict[EngineGroup, Estimate]
    observations: tuple[Observation, ...]
    experiments: tuple[str, ...]
    left_out: dict[str, int]
    errors: NDArray[np.float64]
    factors: Factors | None = None

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        """Return the engine of a run by its shape.

        Raises:
            CannotPredictError: its model, GPU or quantization is not in the catalogue, or its group was not measured.
        """
        group = group_of(run)
        label = f"fit without {run.exp}" if run.exp not in self.experiments else "fit, this experiment in it"
        overhead = self.point_overhead(group)
        source = self.source(group, label)
        curve = build_curve(run, group, self.point_corrections(), overhead, factors=self.factors, source=source)
        return PredictedEngine(
            curve=curve, front_end=self.front_end(group), async_scheduling=group.async_scheduling, label=label
        )

    def source(self, group: EngineGroup, label: str) -> CurveSource:
        """Return what the curves of a group say of themselves: label, and the range of its observations."""
        seen = [each for each in self.observations if each.group is group]
        return CurveSource(
            label=label,
            detail=label,
            max_decodes=round(max(each.decodes for each in seen)),
            max_decode_kv_tokens=round(max(each.kv_tokens for each in seen)),
            max_prefill_tokens=max(each.run.max_num_batched_tokens or 0 for each in seen),
            error_growth_per_doubling=ASSUMED_ERROR_GROWTH,
        )

    def point_corrections(self) -> Corrections:
        """Return the corrections without their intervals."""
        return Corrections(**{name: estimate.value for name, estimate in self.corrections.items()})

    def point_overhead(self, group: EngineGroup) -> OverheadFactors:
        """Return a group's overheads without their intervals.

        Raises:
            CannotPredictError: no run of the group was in the fit.
        """
        if group not in self.overheads:
            known = ", ".join(known.name for known in self.overheads)
            raise CannotPredictError(f"no run of {group.name} was measured; known are: {known}")
        return OverheadFactors(**{name: estimate.value for name, estimate in self.overheads[group].items()})

    def parameters(self) -> NDArray[np.float64]:
        """Return all values in the order of ``Observation.terms``; 0 for a group that was not measured."""
        values = np.zeros(len(CORRECTIONS) + len(GROUPS) * len(OVERHEADS))
        values[: len(CORRECTIONS)] = [estimate.value for estimate in self.corrections.values()]
        for group, overhead in self.overheads.items():
            values[overhead_columns(group)] = [estimate.value for estimate in overhead.values()]
        return values

    def front_end(self, group: EngineGroup) -> FrontEnd:
        """Return a group's front end: the packaged one with the group's delay where that was measured."""
        costs = asdict(default_front_end())
        if group in self.delays_s:
            costs["delay_s"] = self.delays_s[group].value
        return FrontEnd(**costs)


def fit(
    runs: Iterable[MeasuredRun],
    *,
    without: Collection[str] = (),
    resamples: int = RESAMPLES,
    kernels: Literal["V1", "V0"] = "V1",
    factors: Factors | None = None,
) -> Calibration:
    """Fit the parameters to measured runs.

    Args:
        runs: any; flagged ones, mixtures of experts and ones the model of a steady iteration does not fit are left out
            and counted.
        without: experiments to leave out, to be predicted by a fit that has not seen them.
        resamples: refits for the intervals; 0: no intervals, each is its value.
        kernels: generation of engines to fit, see ``EngineGroup``; runs of the other are left out and counted.
        factors: kernel efficiencies that the corrections are of; None: the packaged ones.

    Raises:
        ValueError: no run is left to fit to.
    """
    observations: list[Observation] = []
    left_out: dict[str, int] = {}
    for run in runs:
        if run.exp in without:
            continue
        found = observe(run, factors)
        if not isinstance(found, str) and found.group.kernels != kernels:
            found = f"{found.group.name}, other kernels: fitted apart"
        if isinstance(found, str):
            left_out[found] = left_out.get(found, 0) + 1
        else:
            observations.append(found)
    if not observations:
        raise ValueError(f"no measured run is left to fit to; left out: {left_out}")
    design = np.array([seen.terms for seen in observations])
    measured_s = np.array([seen.measured_s for seen in observations])
    value = solve(design, measured_s)
    experiments = sorted({seen.run.exp for seen in observations})
    rows_of = [np.flatnonzero([seen.run.exp == name for seen in observations]) for name in experiments]
    resampled = []
    for number in range(resamples):
        drawn = stream(0, "experiments", number).integers(len(experiments), size=len(experiments))
        rows = np.concatenate([rows_of[index] for index in drawn])
        resampled.append(solve(design[rows], measured_s[rows]))
    for column in range(len(CORRECTIONS), len(value)):
        if not design[:, column].any():
            value[column] = _unseen_overhead(column)
    errors = design @ value / measured_s - 1
    low, high = np.quantile([*resampled, value], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    if resamples:
        margin = _NORMAL_QUANTILE * np.sqrt(np.diag(covariance(design / measured_s[:, None], errors)))
        low, high = np.minimum(low, value - margin), np.maximum(high, value + margin)
    estimates = [
        Estimate(value=float(v), low=max(0.0, float(min(lo, v))), high=float(max(hi, v)))
        for v, lo, hi in zip(value, low, high, strict=True)
    ]
    seen_groups = [group for group in GROUPS if any(seen.group is group for seen in observations)]
    overheads = {group: dict(zip(OVERHEADS, estimates[overhead_columns(group)], strict=True)) for group in seen_groups}
    calibration = Calibration(
        corrections=dict(zip(CORRECTIONS, estimates[: len(CORRECTIONS)], strict=True)),
        overheads=overheads,
        delays_s={},
        observations=tuple(observations),
        experiments=tuple(experiments),
        left_out=left_out,
        errors=errors,
        factors=factors,
    )
    for group in seen_groups:
        corrections, overhead = calibration.point_corrections(), calibration.point_overhead(group)
        seen = [each for each in observations if each.group is group]
        curves = [build_curve(each.run, group, corrections, overhead, factors=factors) for each in seen]
        delay_s = front_end_delay_s(seen, curves, resamples=resamples)
        if delay_s is not None:
            calibration.delays_s[group] = delay_s
    return calibration


def _unseen_overhead(column: int) -> float:
    """Return the roofline's value of an overhead that no run tells of."""
    number, field = divmod(column - len(CORRECTIONS), len(OVERHEADS))
    assumed: float = getattr(
        packaged_factors().overhead(async_scheduling=GROUPS[number].async_scheduling), OVERHEADS[field]
    )
    return assumed


def covariance(relative: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the covariance of the parameters at the solution.

    Args:
        relative: shape (observations, parameters), terms over measured times.
        errors: shape (observations,), relative errors of the solution.
    """
    # In units of the prior's spreads the prior is the identity, and the inverse is well conditioned.
    overheads = [UNKNOWN_SPREAD[name] for name in OVERHEADS]
    spreads = np.array([PRIOR_SPREAD[name] for name in CORRECTIONS] + overheads * len(GROUPS))
    rows = relative * spreads * np.sqrt(huber_weights(errors))[:, None] / NOISE
    scaled = np.linalg.inv(np.eye(len(spreads)) + rows.T @ rows)
    return np.asarray(spreads[:, None] * scaled * spreads)


def solve(design: NDArray[np.float64], measured_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the non-negative parameters of least Huber loss of relative errors, under the prior on the corrections.

    Args:
        design: shape (observations, parameters), seconds per unit of each parameter.
        measured_s: shape (observations,).
    """
    parameters = design.shape[1]
    prior_rows = np.zeros((len(CORRECTIONS), parameters))
    for row, name in enumerate(CORRECTIONS):
        prior_rows[row, row] = 1 / PRIOR_SPREAD[name]
    prior_values = prior_rows.sum(axis=1)  # all corrections at 1
    relative = design / measured_s[:, None] / NOISE
    # Columns differ by many powers of ten (a share, seconds, passes); alike, nnls stays accurate.
    scale = np.maximum(np.abs(np.vstack([relative, prior_rows])).max(axis=0), 1e-300)
    weight = np.ones(len(measured_s))
    value = np.zeros(parameters)
    for _ in range(50):
        matrix = np.vstack([relative * weight[:, None], prior_rows]) / scale
        new, _ = nnls(matrix, np.concatenate([weight / NOISE, prior_values]))
        new = new / scale
        if np.allclose(new, value, rtol=1e-9, atol=0):
            break
        value = new
        weight = np.sqrt(huber_weights(relative @ value * NOISE - 1))
    return value


def huber_weights(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much observations with these relative errors count, 1 unless they are beyond HUBER."""
    return HUBER / np.maximum(np.abs(errors) / NOISE, HUBER)
