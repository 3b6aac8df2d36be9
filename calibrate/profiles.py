"""From a fit to profile files, one per expert, with the error of predictions that had not seen the run."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isnan
from pathlib import Path

import numpy as np

from calibrate.fit import Calibration
from calibrate.held_out import HeldOut, error_growth, held_out_errors, quantization_errors
from calibrate.measured_runs import MeasuredRun
from calibrate.observations import Observation, observe
from calibrate.parameters import CORRECTIONS, OVERHEADS, V0, EngineGroup, Estimate
from calibrate.run_engine import run_engine, shape_of
from sim.catalogue import find_gpu, find_model, find_quantization
from sim.factors import Factors, how_set, packaged_factors
from sim.memory import block_size_of, engine_defaults, memory_budget
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
from sim.resolve import DEFAULT_MAX_MODEL_LEN, profile_name
from sim.roofline import default_front_end
from sim.spec import EngineSpec

LLAMA_FAMILY = (
    "llama-3-8b",
    "llama-3.1-8b",
    "llama-3-70b",
    "llama-3.1-70b",
    "llama-2-7b",
    "llama-2-70b",
    "codellama-34b",
)
GPUS = ("H100-SXM", "H200", "A100-80GB", "L40S")
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
LICENCE = (
    "fitted figures only; the measurements are those of the public repositories named in the provenance, under their "
    "own terms"
)

_LISTED_SOURCES = 4

ExpertKey = tuple[str, str, str, int]
"""Model, quantization, GPU and tensor-parallel size, by catalogue names."""


def llama_family(quantizations: Sequence[str] = ("bf16",)) -> list[ExpertKey]:
    """Return the experts of the Llama family that fit their GPUs; other than bf16 only where a GPU has the rate."""
    keys = [
        (model, quantization, gpu, size)
        for quantization in quantizations
        for model in LLAMA_FAMILY
        for gpu in GPUS
        for size in TENSOR_PARALLEL_SIZES
        if find_quantization(quantization).compute == find_quantization(quantization).compute_on(find_gpu(gpu))
    ]
    return [key for key in keys if why_impossible(key) is None]


def expert_key(text: str) -> ExpertKey:
    """Read MODEL/QUANTIZATION/GPU/TP, by any names of the catalogue; the model's own may hold slashes.

    Raises:
        ValueError: it has not these parts, or the expert cannot exist.
        UnknownNameError: the catalogue lacks one of them.
    """
    parts = text.rsplit("/", 3)
    if len(parts) != 4 or not parts[3].isdecimal() or int(parts[3]) < 1:
        raise ValueError(
            f"expert {text!r}: expected MODEL/QUANTIZATION/GPU/TP such as llama-3.1-8b/bf16/H100-SXM/1, TP the number "
            "of its GPUs"
        )
    key = find_model(parts[0]).name, find_quantization(parts[1]).name, find_gpu(parts[2]).name, int(parts[3])
    reason = why_impossible(key)
    if reason is not None:
        raise ValueError(f"expert {text!r}: {reason}")
    return key


def why_impossible(key: ExpertKey) -> str | None:
    """Return why an expert cannot exist, None if it can: with room for a request of the default length."""
    model, quantization, gpu, size = find_model(key[0]), find_quantization(key[1]), find_gpu(key[2]), key[3]
    if not quantization.supported_on(gpu):
        return f"{quantization.name} does not run on {gpu.name}"
    if not model.allows_tensor_parallel(size):
        return f"{model.name} cannot be split over {size} GPUs"
    if kv_tokens(key) < min(DEFAULT_MAX_MODEL_LEN, model.max_model_len):
        return f"{model.name} in {quantization.name} does not fit into {gpu.name} x{size}"
    return None


def kv_tokens(key: ExpertKey) -> int:
    """Return how many tokens of KV an expert has room for, with vLLM's defaults."""
    model, quantization, gpu, size = key
    tokens, seqs = engine_defaults(find_gpu(gpu))
    budget = memory_budget(
        find_model(model),
        find_quantization(quantization),
        find_gpu(gpu),
        tensor_parallel_size=size,
        engine=EngineSpec(),
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
    )
    return budget.num_kv_blocks * block_size_of(EngineSpec(), find_gpu(gpu))


def key_of(run: MeasuredRun) -> ExpertKey:
    """Return the expert that a run measured.

    Raises:
        CannotPredictError: the catalogue lacks its model, quantization or GPU.
    """
    model, quantization, gpu = shape_of(run)
    return model.name, quantization.name, gpu.name, run.tp


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
    """Return the front end of a group's profiles: the delay as fitted, the rest as the roofline assumes it."""
    costs = {
        name: Parameter(value=_digits(value), assumed=how_set(f"front_end.{name}"))
        for name, value in asdict(default_front_end()).items()
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
