"""From what a user states to what the simulation runs: vLLM's defaults, KV blocks, curves, and the class map.

Nothing is checked here beyond what resolving needs; ``sim.feasibility`` says beforehand, in the file's words, what
cannot work.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any

from sim.catalogue import find_gpu, find_model, find_quantization
from sim.factors import OverheadFactors, packaged_factors
from sim.fleet import EngineSettings, Expert, Fleet, FrontEnd, Outage
from sim.fleet_file import is_profile_file
from sim.memory import MemoryBudget, block_size_of, engine_defaults, memory_budget, overlaps_scheduling
from sim.mistakes import did_you_mean
from sim.profile import Profile, ProfileCurve, ProfileError, TermParameters, load_profile, source_of
from sim.roofline import Corrections, Roofline, default_front_end
from sim.service_curve import ServiceCurve
from sim.spec import ExpertSpec, FleetFile, FleetSpec, FrontEndSpec

_roofline = cache(Roofline)  # alike experts share one, with what it has worked out

PACKAGED_ENGINE = "vllm-0.15"
"""Engine version of the packaged profiles."""

DEFAULT_MAX_MODEL_LEN = 8192
"""Longest request in tokens unless the file says otherwise or the model takes less. vLLM's own default is the model's
limit (131,072 for Llama 3.1), for which few fleets have the KV cache."""


def resolve_fleet(file: FleetFile, name: str) -> Fleet:
    """Resolve one fleet of a feasible file.

    Raises:
        KeyError: the file has no fleet of this name.
        ValueError: an expert cannot work; ``sim.feasibility.check_feasible`` tells why, with numbers.
    """
    spec = file.fleets[name]
    experts = tuple(resolve_expert(expert_name, expert) for expert_name, expert in spec.experts.items())
    order = {expert.name: index for index, expert in enumerate(experts)}
    class_map = experts_of_classes(spec, list(file.workload.classes))
    return Fleet(
        name=name,
        router=spec.router,
        experts=experts,
        class_map=tuple(tuple(order[expert] for expert in names) for names in class_map.values()),
        outages=tuple(
            Outage(
                expert_index=order[outage.expert],
                replica_index=outage.replica,
                at_s=outage.at_s,
                for_s=inf if outage.for_s is None else outage.for_s,
            )
            for outage in spec.outages
        ),
        health=file.serve.health,
        limits=file.serve.limits,
    )


def experts_of_classes(fleet: FleetSpec, classes: Sequence[str]) -> dict[str, list[str]]:
    """Return the experts of each class, the preferred one first: the fleet's class map, or its default.

    By default a fleet's only expert serves every class, and of several experts each serves the class of its name. A
    class that no expert serves has an empty list. Policies that ignore classes need no map: every expert serves all.
    """
    if fleet.class_map is not None:
        return {name: fleet.class_map.get(name, []) for name in classes}
    if len(fleet.experts) == 1 or not routes_by_class(fleet):
        return {name: list(fleet.experts) for name in classes}
    return {name: [name] if name in fleet.experts else [] for name in classes}


def routes_by_class(fleet: FleetSpec) -> bool:
    """Whether the class of a prompt decides on its expert."""
    return fleet.router is None or fleet.router.policy in ("class", "class_with_spill_over")


def resolve_expert(name: str, spec: ExpertSpec) -> Expert:
    """Resolve one expert.

    Raises:
        UnknownNameError: a model, GPU or quantization that the catalogue lacks.
        ValueError: no KV block is left.
    """
    model, gpu, quantization = find_model(spec.model), find_gpu(spec.gpu), find_quantization(spec.quantization)
    engine = engine_settings(spec)
    gpus = spec.tensor_parallel_size * spec.replicas
    profile = profile_of(spec)
    curve: ServiceCurve
    if profile is not None and isinstance(profile.parameters, TermParameters):
        curve = ProfileCurve(profile)
    else:
        curve = _roofline(
            model,
            quantization,
            gpu,
            tensor_parallel_size=spec.tensor_parallel_size,
            kv_cache_dtype=spec.engine.kv_cache_dtype,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            enforce_eager=spec.engine.enforce_eager,
            async_scheduling=engine.async_scheduling,
            sampling_filter=model.default_sampling if spec.engine.generation_config == "auto" else None,
            **({} if profile is None else _calibrated(profile)),
        )
    return Expert(
        name=name,
        model=model.name,
        quantization=quantization.name,
        gpu=gpu.name,
        tensor_parallel_size=spec.tensor_parallel_size,
        replicas=spec.replicas,
        engine=engine,
        front_end=_front_end(spec.front_end, profile),
        curve=curve,
        gpus=gpus,
        price_per_hour=None if gpu.price_per_hour is None else gpu.price_per_hour * gpus,
    )


def profile_of(spec: ExpertSpec) -> Profile | None:
    """Return the profile an expert names, a file or a packaged one; None for the roofline.

    Raises:
        ProfileError: it cannot be read.
    """
    if spec.profile is None:
        return None
    if is_profile_file(spec.profile):
        return load_profile(Path(spec.profile))
    packaged = packaged_profiles()
    name = spec.profile
    if name == "packaged":
        shape = find_model(spec.model).name, find_quantization(spec.quantization).name, find_gpu(spec.gpu).name
        name = profile_name(*shape, spec.tensor_parallel_size, PACKAGED_ENGINE)
        if name not in packaged:
            raise ProfileError(
                f"no packaged profile {name}{did_you_mean(name, packaged)}; leave it out for the roofline"
            )
    if name not in packaged:
        raise ProfileError(f"unknown profile {name!r}{did_you_mean(name, packaged)}")
    with resources.as_file(resources.files("sim") / "data" / "profiles" / f"{name}.json") as path:
        return load_profile(path)


def _calibrated(profile: Profile) -> dict[str, Any]:
    """What a profile of roofline parameters changes in a ``Roofline``."""
    values = {name: given["value"] for name, given in profile.parameters.model_dump(exclude={"kind"}).items()}
    return {
        "corrections": Corrections(**{field.name: values[field.name] for field in fields(Corrections)}),
        "overhead": OverheadFactors(**{field.name: values[field.name] for field in fields(OverheadFactors)}),
        "factors": packaged_factors().replaced(profile.kernels),
        "source": source_of(profile),
    }


def profile_name(model: str, quantization: str, gpu: str, tensor_parallel_size: int, engine: str) -> str:
    """Return the name of the packaged profile of an expert, all by their catalogue names, if there is one."""
    return f"{model}-{quantization}-{gpu.lower()}-tp{tensor_parallel_size}-{engine}"


def packaged_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files("sim") / "data" / "profiles"
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def engine_limits(spec: ExpertSpec) -> tuple[int, int, int]:
    """Return ``(max_model_len, max_num_batched_tokens, max_num_seqs)`` with what was left out filled in."""
    max_model_len = spec.engine.max_model_len or min(find_model(spec.model).max_model_len, DEFAULT_MAX_MODEL_LEN)
    tokens, seqs = engine_defaults(
        find_gpu(spec.gpu),
        max_model_len=max_model_len,
        max_num_batched_tokens=spec.engine.max_num_batched_tokens,
        max_num_seqs=spec.engine.max_num_seqs,
    )
    return max_model_len, tokens, seqs


def budget_of(spec: ExpertSpec, tensor_parallel_size: int | None = None) -> MemoryBudget:
    """Return how each GPU's memory is divided, at the expert's tensor-parallel size or another one."""
    _, tokens, seqs = engine_limits(spec)
    return memory_budget(
        find_model(spec.model),
        find_quantization(spec.quantization),
        find_gpu(spec.gpu),
        tensor_parallel_size=tensor_parallel_size or spec.tensor_parallel_size,
        engine=spec.engine,
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
    )


def engine_settings(spec: ExpertSpec) -> EngineSettings:
    """Return the engine's settings as vLLM would resolve them on this GPU.

    Raises:
        ValueError: no KV block is left.
    """
    max_model_len, tokens, seqs = engine_limits(spec)
    blocks = budget_of(spec).num_kv_blocks
    if blocks < 1:
        raise ValueError(f"{spec.model} ({spec.quantization}) leaves no room for a KV cache on {spec.gpu}")
    return EngineSettings(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=max_model_len,
        block_size=block_size_of(spec.engine, find_gpu(spec.gpu)),
        num_kv_blocks=blocks,
        enable_prefix_caching=spec.engine.enable_prefix_caching,
        scheduler_reserve_full_isl=spec.engine.scheduler_reserve_full_isl,
        async_scheduling=overlaps_scheduling(spec.engine, find_gpu(spec.gpu)),
    )


def _front_end(spec: FrontEndSpec, profile: Profile | None) -> FrontEnd:
    """The front end's work: each figure from the file, else measured with the profile, else the roofline's."""
    default = asdict(default_front_end())
    if profile is not None and profile.front_end is not None:
        measured = {name: getattr(profile.front_end, name) for name in default}
        default = {name: 0.0 if figure is None else figure.value for name, figure in measured.items()}
    return FrontEnd(**(default | spec.model_dump(exclude_none=True)))
