"""What an engine's log says: how far the start is, why it failed, and what settings it resolved."""

import re
from dataclasses import dataclass

_PREFIX = re.compile(
    r"^(?:\(\w[\w-]* pid=\d+\) )?"
    r"(?:(?:INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ (?:\d+\.\d+ )?\[[\w.]+:\d+\] ?)?"
)

_STAGES = (
    (re.compile(r"Application startup complete"), "ready"),
    (re.compile(r"init engine .* took"), "starting to listen"),
    (re.compile(r"KV cache size: ([\d,]+ tokens)"), r"KV cache of \1"),
    (re.compile(r"Capturing CUDA graph", re.IGNORECASE), "capturing graphs"),
    (re.compile(r"torch.compile takes|Compiling a graph", re.IGNORECASE), "compiling"),
    (re.compile(r"Starting to load model"), "loading the model"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine"),
    (re.compile(r"Resolved architecture: (\w+)"), r"\1"),
)

_REASONS = (
    (
        re.compile(r"No module named '?vllm'?"),
        "vLLM is not installed: pip install 'expert-router[gpu]', or, without a GPU, make install-cpu",
    ),
    (re.compile(r"address already in use", re.IGNORECASE), "its port is in use"),
    (
        re.compile(
            r"larger than the available KV cache memory|max seq len .* larger than the maximum number of tokens"
        ),
        "the KV cache is too small for one request; raise num_gpu_blocks_override or lower max_model_len",
    ),
    (
        re.compile(
            r"less than requested memory for kv|less than desired .* memory utilization|No available memory for"
        ),
        "too little memory is free for the KV cache; lower num_gpu_blocks_override or gpu_memory_utilization, or free "
        "some",
    ),
    (
        re.compile(r"out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory|MemoryError"),
        "the model is too large for the memory there is; take a smaller one, another quantization, or more GPUs",
    ),
    (
        re.compile(r"does not recognize this architecture|architectures? .* (?:not supported|failed to be inspected)"),
        "vLLM does not know this model's architecture",
    ),
    (
        re.compile(r"Cannot find any model weights|no .*safetensors.* found", re.IGNORECASE),
        "the checkpoint has no weights; give a folder that has, or leave checkpoint out for random ones",
    ),
    (
        re.compile(r"Repo id must be|is not a valid model identifier|Repository Not Found|Invalid repository ID"),
        "there is no such checkpoint",
    ),
    (
        re.compile(r"No CUDA GPUs are available|Failed to infer device type|CUDA driver version is insufficient"),
        "no GPU is found",
    ),
    (re.compile(r"greater than the derived max_model_len"), "max_model_len is longer than the checkpoint's"),
    (
        re.compile(r"quantization method .* (?:not supported|does not match)|Minimum capability"),
        "this quantization does not run here",
    ),
)

_DIED = re.compile(r"(?:proc|process) .*died unexpectedly|Engine core .* died|EngineDeadError:")

_ERROR_LINE = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b.*: \S.*|\s*Value error, .+|.*\berror: .+)")

_FAILED = re.compile(r"EngineCore failed to start|WorkerProc initialization failed|Engine core initialization failed")

_WRAPPERS = (
    "WorkerProc initialization failed",
    "Engine core initialization failed",
    "validation error for",
    "cancelled",
)


def stage(log: str) -> str:
    """Return how far a start is, in a few words; empty before anything is known."""
    for pattern, words in _STAGES:
        found = pattern.search(log)
        if found is not None:
            return found.expand(words)
    return ""


def has_failed(log: str) -> bool:
    """Whether the engine says that it could not start; its API server may live on a while, or hang."""
    return _FAILED.search(log) is not None


def diagnose(log: str, exit_status: int | None = None) -> str:
    """Return why an engine ended, in plain words, and the line of its log that says so."""
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    for pattern, words in _REASONS:
        line = next((line for line in lines if pattern.search(line)), None)
        if line is not None:
            return f"{words} ({_short(line)})"
    for line in lines:  # the first is the cause, what follows it its consequences
        if _DIED.search(line):
            return f"one of its processes crashed or was killed ({_short(line)})"
        if _ERROR_LINE.match(line) and not any(word in line for word in _WRAPPERS):
            return _short(line)
    if exit_status == 128 + 9:
        return "it was killed (signal 9), by hand or for want of memory"
    told = [line for line in lines if line]
    return f"it ended with status {exit_status}; the last line of its log: {_short(told[-1]) if told else 'none'}"


def _short(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What a running engine says of itself; None where it says nothing.

    Attributes:
        num_gpu_blocks: KV blocks, vLLM's null block counted.
    """

    version: str | None = None
    num_gpu_blocks: int | None = None
    block_size: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool | None = None
    async_scheduling: bool | None = None
    enforce_eager: bool | None = None
    kv_cache_dtype: str | None = None
    dtype: str | None = None
    quantization: str | None = None


def read_report(log: str, metrics: str, *, version: str | None, max_model_len: int | None) -> EngineReport:
    """Gather what an engine resolved, from its log, its ``/metrics``, and what ``/version`` and ``/v1/models`` said."""
    found = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
    cache = dict(re.findall(r'(\w+)="([^"]*)"', found.group(1))) if found else {}
    config = re.search(r"Initializing a V1 LLM engine .*", log)
    engine = dict(re.findall(r"\b(\w+)=([^\s,]+)", config.group(0))) if config else {}
    given = re.search(r"non-default args: \{.*", log)
    arguments = dict(re.findall(r"'(\w+)': (\w+)", given.group(0))) if given else {}
    on_cpu = engine.get("device_config") == "cpu"
    return EngineReport(
        version=version,
        num_gpu_blocks=_integer(cache.get("num_gpu_blocks")),
        block_size=_integer(cache.get("block_size")),
        max_model_len=max_model_len,
        max_num_seqs=_integer(arguments.get("max_num_seqs")),
        max_num_batched_tokens=_integer(arguments.get("max_num_batched_tokens")),
        enable_prefix_caching=_truth(cache.get("enable_prefix_caching")),
        # The CPU backend switches it off whatever it is told, and does not say so (vllm/platforms/cpu.py, 0.32.0).
        async_scheduling=False if on_cpu else _truth(arguments.get("async_scheduling")),
        enforce_eager=_truth(engine.get("enforce_eager")),
        kv_cache_dtype=cache.get("cache_dtype"),
        dtype=engine.get("dtype"),
        quantization=engine.get("quantization"),
    )


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _truth(text: str | None) -> bool | None:
    return {"True": True, "False": False}.get(text or "")
