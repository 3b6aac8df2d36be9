"""How much more to measure: which parameter of a fit is known worst, and which engines would narrow it most.

Near its solution a fit is a linear model with known noise and prior, so the covariance of its parameters is the
inverse of the information in its observations. One more observation with terms ``x`` and standard deviation ``s`` takes
``(C x)_j ** 2 / (s ** 2 + x C x)`` off the variance of parameter ``j`` (Sherman and Morrison 1950). Each observation
counts as independent here; stages of one experiment are less than that, so a real experiment may narrow less.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.fit.experts import ExpertKey, kv_tokens, why_impossible
from calibrate.fit.fit import NOISE, Calibration, covariance
from calibrate.fit.observations import Observation, observe
from calibrate.fit.parameters import CORRECTIONS, OVERHEADS, EngineGroup, Estimate, overhead_columns
from calibrate.tables.measured_runs import MeasuredRun

BATCHES = (1, 8, 32, 64, 128, 256)
PROMPT_TOKENS, OUTPUT_TOKENS = 200, 1600
"""Lengths of a suggested measurement: chat prompts, and outputs so long that few iterations carry a prefill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What a fit knows of one parameter.

    Attributes:
        estimate: value and 90 % interval.
        share: of a typical iteration that the parameter accounts for (mean over the group's observations).
        spread: standard deviation by the linear model.
        felt: by how much of a typical iteration the prediction moves with one ``spread``.
    """

    name: str
    estimate: Estimate
    share: float
    spread: float
    felt: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """An engine and a batch to measure next.

    Attributes:
        expert: model, quantization, GPU and tensor-parallel size.
        batch: requests to keep in flight, of PROMPT_TOKENS and OUTPUT_TOKENS; the median gap between tokens counts.
        narrowing: by what share the standard deviation of the parameter shrinks.
    """

    expert: ExpertKey
    batch: int
    narrowing: float


def knowledge(calibration: Calibration, group: EngineGroup) -> list[Knowledge]:
    """Return what is known of the corrections and a group's overheads, the worst known first.

    Worst is what leaves predictions of a typical iteration most uncertain; a parameter that nobody feels comes last.

    Raises:
        CannotPredictError: no run of the group was in the fit.
    """
    calibration.point_overhead(group)
    spreads = np.sqrt(np.diag(_covariance(calibration)))
    seen = [each for each in calibration.observations if each.group is group]
    per_unit = np.mean([each.terms / each.measured_s for each in seen], axis=0)
    estimates = {**calibration.corrections, **calibration.overheads[group]}
    found = [
        Knowledge(
            name=name,
            estimate=estimates[name],
            share=float(per_unit[column] * estimates[name].value),
            spread=float(spreads[column]),
            felt=float(per_unit[column] * spreads[column]),
        )
        for name, column in _columns(group).items()
    ]
    return sorted(found, key=lambda each: -each.felt)


def suggest(
    calibration: Calibration,
    group: EngineGroup,
    parameter: str,
    candidates: Iterable[Observation],
    count: int = 5,
) -> list[Suggestion]:
    """Return the candidates that would narrow a parameter most, the best batch of each engine only.

    Args:
        calibration: so far.
        group: whose overhead ``parameter`` is, if it is one.
        parameter: of CORRECTIONS or OVERHEADS.
        candidates: what could be measured, from ``candidate_points``.
        count: how many to return.
    """
    points = list(candidates)
    if not points:
        return []
    shares = narrowings(calibration, group, parameter, points)
    best: dict[ExpertKey, Suggestion] = {}
    for point, share in zip(points, shares, strict=True):
        run = point.run
        suggestion = Suggestion(
            expert=(run.model, run.quantization, run.gpu, run.tp), batch=round(point.decodes), narrowing=float(share)
        )
        known = best.get(suggestion.expert)
        if known is None or suggestion.narrowing > known.narrowing:
            best[suggestion.expert] = suggestion
    return sorted(best.values(), key=lambda each: -each.narrowing)[:count]


def narrowings(
    calibration: Calibration, group: EngineGroup, parameter: str, candidates: Sequence[Observation]
) -> NDArray[np.float64]:
    """Return by what share each candidate alone would shrink the standard deviation of a parameter."""
    column = _columns(group)[parameter]
    known = _covariance(calibration)
    terms = np.array([point.terms for point in candidates])
    noise_s = NOISE * terms @ calibration.parameters()
    spread = terms @ known
    gained = spread[:, column] ** 2 / (noise_s**2 + np.sum(spread * terms, axis=1))
    return np.asarray(1 - np.sqrt(np.maximum(0.0, 1 - gained / known[column, column])))


def candidate_points(experts: Iterable[ExpertKey], engine_version: str) -> list[Observation]:
    """Return what steady decode batches of these experts would tell, for each of BATCHES that their KV cache holds.

    Of models of one shape only the first is among them.
    """
    points: dict[bytes, Observation] = {}
    for expert in experts:
        model, quantization, gpu, size = expert
        for batch in BATCHES:
            if why_impossible(expert) is not None or kv_tokens(expert) < batch * (PROMPT_TOKENS + OUTPUT_TOKENS):
                continue
            run = MeasuredRun(
                run_id="candidate",
                exp="candidate",
                stage=0,
                engine="vLLM",
                engine_version=engine_version,
                model=model,
                quantization=quantization,
                gpu=gpu,
                tp=size,
                arch="dense",
                load_type="saturated_closed_loop",
                concurrency_mean=float(batch),
                prompt_tokens_mean=float(PROMPT_TOKENS),
                prompt_tokens_std=0.0,
                output_tokens_mean=float(OUTPUT_TOKENS),
                output_tokens_std=0.0,
                itl_p50_s=1.0,  # not known; the terms do not depend on it
            )
            point = observe(run)
            if not isinstance(point, str):
                points.setdefault(point.terms.tobytes(), point)
    return list(points.values())


def _columns(group: EngineGroup) -> dict[str, int]:
    """Return where the corrections and a group's overheads are among the parameters."""
    columns = {name: number for number, name in enumerate(CORRECTIONS)}
    first = overhead_columns(group).start
    return columns | {name: first + number for number, name in enumerate(OVERHEADS)}


def _covariance(calibration: Calibration) -> NDArray[np.float64]:
    relative = np.array([seen.terms / seen.measured_s for seen in calibration.observations])
    return covariance(relative, calibration.errors)
