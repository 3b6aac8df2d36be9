"""Whether one expert can run: its names, its profile, and whether its model fits its GPUs."""

from collections.abc import Callable

from sim.catalogue import Gpu, ModelShape, Quantization, UnknownNameError, find_gpu, find_model, find_quantization
from sim.memory import CPU_BLOCK_MULTIPLE, GIB, MemoryBudget, block_size_of, overlaps_scheduling
from sim.mistakes import Mistakes
from sim.profile import ProfileError
from sim.resolve import budget_of, engine_limits, profile_of
from sim.spec import ExpertSpec
from sim.yaml_tree import Path

_Find = Callable[[str], ModelShape] | Callable[[str], Gpu] | Callable[[str], Quantization]
_FINDERS: dict[str, _Find] = {"model": find_model, "gpu": find_gpu, "quantization": find_quantization}


def check_expert(expert: ExpertSpec, at: Path, mistakes: Mistakes) -> bool:
    """Note what keeps an expert from running; return whether the catalogue has all its names."""
    if not _check_names(expert, at, mistakes):
        return False
    _check_profile(expert, at, mistakes)
    _check_engine(expert, at, mistakes)
    if _check_parallel(expert, at, mistakes):
        _check_memory(expert, at, mistakes)
    return True


def _check_names(expert: ExpertSpec, at: Path, mistakes: Mistakes) -> bool:
    known = True
    for field, find in _FINDERS.items():
        try:
            find(getattr(expert, field))
        except UnknownNameError as error:
            mistakes.add((*at, field), str(error))
            known = False
    if not known:
        return False
    gpu, quantization = find_gpu(expert.gpu), find_quantization(expert.quantization)
    if not quantization.supported_on(gpu):
        if gpu.kind == "cpu":
            problem = f"{quantization.name} does not run on CPUs, vLLM has no kernels for it there"
            mistakes.add((*at, "quantization"), problem, ", take bf16, int8, awq or gptq")
            return True
        problem = f"{quantization.name} does not run on {gpu.name} (compute capability {gpu.compute_capability:.1f})"
        highest = quantization.max_compute_capability
        limit = f"{quantization.min_compute_capability:.1f} " + (f"to {highest:.1f}" if highest else "or more")
        mistakes.add((*at, "quantization"), problem, f", it needs {limit}")
    return True


def _check_profile(expert: ExpertSpec, at: Path, mistakes: Mistakes) -> None:
    """Check that an expert's profile was made for it."""
    try:
        profile = profile_of(expert)
    except ProfileError as error:
        for line in str(error).splitlines():
            mistakes.add((*at, "profile"), line)
        return
    if profile is None:
        return
    made_for = profile.expert
    gpu = find_gpu(expert.gpu)
    pairs: list[tuple[str, object, object]] = [
        (field, _canonical(find, getattr(made_for, field)), _canonical(find, getattr(expert, field)))
        for field, find in _FINDERS.items()
    ]
    pairs += [
        ("tensor_parallel_size", made_for.tensor_parallel_size, expert.tensor_parallel_size),
    ]
    pairs += [
        (field, getattr(made_for.engine, field), getattr(expert.engine, field))
        for field in ("dtype", "kv_cache_dtype", "enforce_eager")
    ]
    overlaps = overlaps_scheduling(made_for.engine, gpu), overlaps_scheduling(expert.engine, gpu)
    pairs.append(("async_scheduling", *overlaps))
    for field, measured, stated in pairs:
        if measured != stated:
            problem = f"profile {profile.name!r} was measured with {field} {measured}, the expert has {stated}"
            mistakes.add((*at, "profile"), problem)


def _canonical(find: _Find, name: str) -> str:
    """The catalogue's name for this name or alias; the name itself when the catalogue lacks it."""
    try:
        return find(name).name
    except UnknownNameError:
        return name


def _check_engine(expert: ExpertSpec, at: Path, mistakes: Mistakes) -> None:
    model = find_model(expert.model)
    max_model_len, tokens, seqs = engine_limits(expert)
    if max_model_len > model.max_model_len:
        problem = f"is {max_model_len} tokens, but {model.name} takes at most {model.max_model_len}"
        mistakes.add((*at, "engine", "max_model_len"), problem)
    if expert.engine.dtype == "float32" and find_gpu(expert.gpu).kind != "cpu":
        problem = f"is float32, which is for CPUs without fast bfloat16; {expert.gpu} runs auto"
        mistakes.add((*at, "engine", "dtype"), problem)
    block_size = block_size_of(expert.engine, find_gpu(expert.gpu))
    if find_gpu(expert.gpu).kind == "cpu" and block_size % CPU_BLOCK_MULTIPLE:
        problem = f"is {block_size}, on CPUs vLLM takes multiples of {CPU_BLOCK_MULTIPLE}"
        mistakes.add((*at, "engine", "block_size"), problem, ", leave it out for 128")
    if tokens < seqs:
        problem = f"max_num_batched_tokens is {tokens}, fewer than max_num_seqs {seqs}, which the engine refuses"
        mistakes.add((*at, "engine"), problem)


def _check_parallel(expert: ExpertSpec, at: Path, mistakes: Mistakes) -> bool:
    model, size = find_model(expert.model), expert.tensor_parallel_size
    if model.allows_tensor_parallel(size):
        return True
    sizes = [other for other in range(1, model.attention_heads + 1) if model.allows_tensor_parallel(other)]
    problem = f"{size} does not divide the {model.attention_heads} heads and {model.kv_heads} KV heads of {model.name}"
    mistakes.add((*at, "tensor_parallel_size"), problem, f", allowed: {', '.join(map(str, sizes))}")
    return False


def _check_memory(expert: ExpertSpec, at: Path, mistakes: Mistakes) -> None:
    """Check that the weights fit, and after them the KV cache of one request of the largest length."""
    max_model_len, _, _ = engine_limits(expert)
    budget, engine = budget_of(expert), expert.engine
    block_size = block_size_of(engine, find_gpu(expert.gpu))
    kv_tokens = max(0, budget.num_kv_blocks * block_size)
    if budget.kv_cache_bytes < budget.kv_block_bytes:
        mistakes.add((*at, "model"), _does_not_fit(expert, budget), _size_that_fits(expert, max_model_len))
    elif kv_tokens >= max_model_len:
        return
    elif engine.num_gpu_blocks_override is not None:
        problem = (
            f"{engine.num_gpu_blocks_override} blocks of {block_size} tokens, one of them unusable, hold "
            f"{kv_tokens} tokens, fewer than one request of max_model_len {max_model_len}"
        )
        mistakes.add((*at, "engine", "num_gpu_blocks_override"), problem)
    else:
        problem = (
            f"the KV cache holds {kv_tokens} tokens ({_gib(budget.kv_cache_bytes)} GiB per GPU), fewer than one "
            f"request of max_model_len {max_model_len}"
        )
        hint = f", lower max_model_len to {kv_tokens} or less" if kv_tokens else ""
        mistakes.add(_engine_field(expert, at, "max_model_len"), problem, hint + _size_that_fits(expert, max_model_len))


def _engine_field(expert: ExpertSpec, at: Path, field: str) -> Path:
    """Path of an engine setting, or of the model when the file leaves the setting out."""
    return (*at, "engine", field) if field in expert.engine.model_fields_set else (*at, "model")


def _does_not_fit(expert: ExpertSpec, budget: MemoryBudget) -> str:
    used_bytes = budget.requested_bytes - budget.kv_cache_bytes
    return (
        f"{expert.model} in {expert.quantization} at tensor_parallel_size {expert.tensor_parallel_size} needs "
        f"{_gib(used_bytes)} GiB per GPU without any KV cache ({_gib(budget.weight_bytes)} GiB weights), "
        f"{expert.gpu} gives {_gib(budget.requested_bytes)} GiB "
        f"({expert.engine.gpu_memory_utilization:g} of {_gib(budget.total_bytes)} GiB)"
    )


def _size_that_fits(expert: ExpertSpec, max_model_len: int) -> str:
    model, gpu = find_model(expert.model), find_gpu(expert.gpu)
    if gpu.kind == "cpu":
        return ", take a smaller model or another quantization"
    for size in range(1, model.attention_heads + 1):
        if model.allows_tensor_parallel(size):
            budget = budget_of(expert, size)
            enough = budget.num_kv_blocks * block_size_of(expert.engine, gpu) >= max_model_len
            if enough and budget.kv_cache_bytes >= budget.kv_block_bytes:  # the number of blocks may be set by hand
                return f", smallest tensor_parallel_size that fits: {size}"
    return ", no tensor_parallel_size fits"


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / GIB:.1f}"
