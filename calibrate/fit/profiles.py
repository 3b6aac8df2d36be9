"""From a fit to profile files, one per expert, with the error of predictions that had not seen the run."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from math import isnan
from pathlib import Path

import numpy as np

from calibrate.fit.experts import ExpertKey, key_of
from calibrate.fit.fit import Calibration
from calibrate.fit.held_out import HeldOut, HeldOutErrors
from calibrate.fit.observations import Observation
from calibrate.fit.parameters import CORRECTIONS, OVERHEADS, V0, EngineGroup, Estimate
from calibrate.tables.run_engine import run_engine, shape_of
from sim.catalogue import find_gpu
from sim.factors import Factors, how_set, packaged_factors
from sim.profile import (
    ASSUMED_ERROR_GROWTH,
    ExpertIdentity,
    FittedRange,
    FrontEndCosts,
    Parameter,
    Profile,
    Residuals,
    RooflineParameters,
)
from sim.resolve import profile_name
from sim.roofline import default_front_end
from sim.spec import EngineSpec

LICENCE = (
    "fitted figures only; the measurements are those of the public repositories named in the provenance, under their "
    "own terms"
)

_LISTED_SOURCES = 4


def provenance_of(calibration: Calibration) -> str:
    """Return what a fit was made of: how many stages of which source, by its repository or the start of the run id."""
    sources = Counter(
        seen.run.source_repo or seen.run.run_id.split("/")[0] for seen in calibration.observations
    ).most_common()
    counts = ", ".join(f"{count} of {source}" for source, count in sources[:_LISTED_SOURCES])
    if len(sources) > _LISTED_SOURCES:
        counts += f", {sum(count for _, count in sources[_LISTED_SOURCES:])} of others"
    return (
        f"fitted to {len(calibration.observations)} load stages of {len(calibration.experiments)} experiments "
        f"({counts}) by expert-router calibrate fit"
    )


def make_profile(
    calibration: Calibration,
    group: EngineGroup,
    key: ExpertKey,
    *,
    engine: str,
    engine_version: str,
    held_out: HeldOutErrors,
    provenance: str,
) -> Profile:
    """Return the profile of one expert.

    Args:
        calibration: fitted to all runs.
        group: of its engine version.
        key: the expert.
        engine: short name of the engine version, the end of the profile's name.
        engine_version: in full.
        held_out: errors of the group.
        provenance: data and command.

    Raises:
        ValueError: see ``HeldOutErrors.like``.
        KeyError: no run of the group was in the fit.
    """
    model, quantization, gpu, size = key
    measured = [key_of(seen.run) for seen in calibration.observations if seen.group is group]
    told, like_what = held_out.like(key, measured)
    worth = told
    if quantization in held_out.by_quantization:
        worth = held_out.by_quantization[quantization]
        like_what = _static_batches_of(quantization, worth)
    notes = [provenance]
    if key not in measured:
        notes.append(_never_measured(key, like_what, gpu_measured=any(gpu == other[2] for other in measured)))
    errors = np.array([error for _, error in worth])
    estimates: dict[str, Estimate] = {**calibration.corrections, **calibration.overheads[group]}
    return Profile(
        name=profile_name(model, quantization, gpu, size, engine),
        expert=ExpertIdentity(
            model=model,
            quantization=quantization,
            gpu=gpu,
            tensor_parallel_size=size,
            engine=EngineSpec(async_scheduling=group.async_scheduling),
            engine_version=engine_version,
        ),
        parameters=RooflineParameters(
            **{name: _rounded(estimates[name]) for name in (*CORRECTIONS, *OVERHEADS)},
        ),
        residuals=Residuals(
            measurements=len(errors),
            what="load stages" if worth is told else "static batches",
            held_out=True,
            engine_version="" if worth is told else V0.name,
            gpus=sorted({shape_of(seen.run)[2].name for seen, _ in worth}),
            mean_error=round(float(errors.mean()), 4),
            median_absolute_error=round(float(np.median(np.abs(errors))), 4),
            p90_absolute_error=round(float(np.quantile(np.abs(errors), 0.9)), 4),
        ),
        range=FittedRange(
            max_decodes=round(max(seen.decodes for seen, _ in told)),
            max_decode_kv_tokens=round(max(seen.kv_tokens for seen, _ in told)),
            max_prefill_tokens=max(seen.run.max_num_batched_tokens or 0 for seen, _ in told),
            error_growth_per_doubling=ASSUMED_ERROR_GROWTH if isnan(held_out.growth) else round(held_out.growth, 2),
        ),
        kernels=kernels_of(calibration),
        front_end=front_end_costs(calibration, group),
        assumptions=assumptions_of(calibration),
        provenance="; ".join(notes),
        licence=LICENCE,
    )


def kernels_of(calibration: Calibration) -> dict[str, float]:
    """Return the kernel efficiencies of a fit that differ from the packaged ones, to the digits of both."""
    if calibration.factors is None:
        return {}
    packaged = packaged_factors().values()
    found = {name: _digits(value) for name, value in calibration.factors.values().items()}
    return {name: value for name, value in found.items() if value != packaged.get(name)}


def front_end_costs(calibration: Calibration, group: EngineGroup) -> FrontEndCosts:
    """Return the front end of a group's profiles: the delay as fitted, the rest as the roofline assumes it.

    A GPU's engine shares no cores with it.
    """
    costs = {
        name: Parameter(value=_digits(value), assumed=how_set(f"front_end.{name}"))
        for name, value in asdict(default_front_end()).items()
        if FrontEndCosts.model_fields[name].is_required()
    }
    if group in calibration.delays_s:
        costs["delay_s"] = _rounded(calibration.delays_s[group])
    return FrontEndCosts(**costs)


def assumptions_of(calibration: Calibration) -> dict[str, str]:
    """Return what every profile rests on that has no interval."""
    found = {
        "cuda_graph_padding": (
            "batches are padded to the sizes that vLLM captures, and a graph replays the kernels of that size: padding "
            "has no parameter of its own, only those of matrix and small_kernels"
        )
    }
    errors = kv_block_errors(calibration.observations)
    found["num_gpu_blocks"] = "computed by the memory model from datasheet and shape" + (
        f", which differs by {min(errors):+.1%} to {max(errors):+.1%} from the {len(errors)} different engines of this "
        "fit that tell theirs"
        if errors
        else "; no engine of this fit tells its own"
    )
    return found


def kv_block_errors(observations: Iterable[Observation]) -> list[float]:
    """Return by what share the memory model's KV blocks differ from those of engines that tell theirs, each once."""
    engines = {(key_of(seen.run), seen.run.kv_blocks or 0): seen.run for seen in observations if seen.run.kv_blocks}
    return [
        run_engine(replace(run, kv_blocks=None)).num_kv_blocks / (blocks - 1) - 1
        for (_, blocks), run in engines.items()
    ]


def _never_measured(key: ExpertKey, like_what: str, *, gpu_measured: bool) -> str:
    """Return what an expert's figures rest on; ``like_what`` as ``HeldOutErrors.like`` returns it."""
    model, quantization, gpu, size = key
    text = f"{model} in {quantization} on {gpu} x{size} itself was never measured: predicted from its shape"
    if quantization != "bf16":
        text += f", {quantization} from its kernels alone"
    if not gpu_measured:
        kernels = "measured kernels" if Factors.is_measured(find_gpu(gpu)) else "the kernels of another GPU"
        text += f"; no engine was measured on {gpu}, only {kernels} tell of it"
    return f"{text}; the errors are of {like_what}"


def _static_batches_of(quantization: str, errors: HeldOut) -> str:
    models = ", ".join(sorted({key_of(seen.run)[0] for seen, _ in errors}))
    return f"static batches of {models} in {quantization} on a V0 engine, by a fit that had seen no {quantization}"


def write_profiles(profiles: Iterable[Profile], folder: Path) -> list[Path]:
    """Write each profile as NAME.json into a folder, made when missing; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for profile in profiles:
        path = folder / f"{profile.name}.json"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(profile.model_dump_json(indent=1, exclude_defaults=False) + "\n", encoding="utf-8")
        partial.replace(path)
        paths.append(path)
    return paths


def _rounded(estimate: Estimate) -> Parameter:
    low, value, high = (_digits(number) for number in (estimate.low, estimate.value, estimate.high))
    return Parameter(value=value, low=min(low, value), high=max(high, value))


def _digits(value: float) -> float:
    """Four significant digits, so that a file does not change with the last bits of a solver."""
    return float(f"{value:.4g}")
