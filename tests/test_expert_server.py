"""A replica's server is told every setting, gets its cores or GPUs, and when it fails says why in plain words."""

from pathlib import Path

import pytest

from real.experts.checkpoints import Checkpoint
from real.experts.cores import Placement, memory_warning, place_replicas, why_not_on_this_cpu
from real.experts.engine_log import diagnose, has_failed, read_report, stage
from real.experts.expert_server import ReplicaPlan, plan_replica, server_command, server_environment
from sim.spec import EngineSpec, ExpertSpec

LOGS = Path(__file__).parent / "data" / "engine_logs"
ENGINE = EngineSpec(
    max_model_len=2048,
    max_num_seqs=64,
    max_num_batched_tokens=1024,
    block_size=128,
    num_gpu_blocks_override=129,
    enforce_eager=True,
    async_scheduling=False,
    generation_config="vllm",
)
LAPTOP = ExpertSpec(model="laptop-37m", gpu="CPU", engine=ENGINE)
SERVER = ExpertSpec(model="llama-3-8b", gpu="H100-SXM", tensor_parallel_size=2)
RANDOM = Checkpoint(place="/models/m", random_weights=True, told="")


def plan(spec: ExpertSpec, placement: Placement, checkpoint: Checkpoint = RANDOM) -> ReplicaPlan:
    return plan_replica("code", 1, spec, checkpoint=checkpoint, placement=placement, port=8101)


def options(spec: ExpertSpec, placement: Placement, checkpoint: Checkpoint = RANDOM) -> dict[str, str | None]:
    words = server_command(plan(spec, placement, checkpoint))[3:]
    return {
        word: None if following.startswith("--") else following
        for word, following in zip(words, [*words[1:], "--"], strict=True)
        if word.startswith("--")
    }


def test_no_engine_setting_is_left_to_the_engine() -> None:
    told = options(LAPTOP, Placement(cores=(1,)))
    assert told == {
        "--model": "/models/m",
        "--served-model-name": "code",
        "--host": "127.0.0.1",
        "--port": "8101",
        "--load-format": "dummy",
        "--dtype": "auto",
        "--tensor-parallel-size": "1",
        "--max-model-len": "2048",
        "--max-num-seqs": "64",
        "--max-num-batched-tokens": "1024",
        "--block-size": "128",
        "--kv-cache-dtype": "auto",
        "--generation-config": "vllm",
        "--num-gpu-blocks-override": "129",
        "--kv-cache-memory-bytes": str(129 * 128 * 2 * 8 * 4 * 64 * 2),  # blocks, tokens, K and V, layers, heads, bf16
        "--enable-prefix-caching": None,
        "--scheduler-reserve-full-isl": None,
        "--no-async-scheduling": None,
        "--enforce-eager": None,
        "--enable-logging-iteration-details": None,
        "--disable-uvicorn-access-log": None,
    }


def test_on_gpus_the_engine_counts_its_blocks_unless_told() -> None:
    told = options(SERVER, Placement(gpus=(0, 1)))
    assert told["--gpu-memory-utilization"] == "0.92"
    assert (told["--max-num-batched-tokens"], told["--max-num-seqs"], told["--max-model-len"]) == (
        "8192",
        "1024",
        "8192",
    )
    assert "--num-gpu-blocks-override" not in told
    assert "--kv-cache-memory-bytes" not in told
    engine = EngineSpec(num_gpu_blocks_override=1000)
    told = options(SERVER.model_copy(update={"engine": engine}), Placement(gpus=(0, 1)))
    assert told["--num-gpu-blocks-override"] == "1000"


def test_real_weights_are_loaded() -> None:
    weights = Checkpoint(place="meta-llama/Meta-Llama-3-8B", random_weights=False, told="")
    assert options(SERVER, Placement(gpus=(0, 1)), weights)["--load-format"] == "auto"
    assert "HF_HUB_OFFLINE" not in server_environment(plan(SERVER, Placement(gpus=(0, 1)), weights))


def test_a_replica_sees_its_cores_or_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    environment = server_environment(plan(LAPTOP, Placement(cores=(2, 3))))
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    pair = LAPTOP.model_copy(update={"tensor_parallel_size": 2})
    assert server_environment(plan(pair, Placement(cores=(0, 1, 2, 3))))["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert server_environment(plan(SERVER, Placement(gpus=(4, 5))))["CUDA_VISIBLE_DEVICES"] == "4,5"


# ------------------------------------------------------------------------------------------------------- cores, GPUs


def cores_of(experts: dict[str, ExpertSpec], machine: int) -> tuple[list[tuple[int, ...]], list[str]]:
    placements, warnings = place_replicas(experts, cores=range(machine))
    return [placement.cores for name in experts for placement in placements[name]], warnings


def test_cores_are_shared_evenly() -> None:
    two = LAPTOP.model_copy(update={"replicas": 2})
    assert cores_of({"a": two, "b": LAPTOP}, 8) == ([(0, 1), (2, 3), (4, 5)], [])
    assert cores_of({"a": LAPTOP, "b": LAPTOP}, 2) == ([(0,), (1,)], [])


def test_cores_asked_for_are_given() -> None:
    wide = LAPTOP.model_copy(update={"cores": 3})
    assert cores_of({"a": wide, "b": LAPTOP}, 8) == ([(0, 1, 2), (3, 4, 5, 6)], [])


def test_too_few_cores_are_shared_with_a_warning() -> None:
    cores, warnings = cores_of({"a": LAPTOP.model_copy(update={"replicas": 3})}, 2)
    assert cores == [(0,), (1,), (0,)]
    assert warnings == [
        "3 replicas want 3 cores and the machine has 2: they share, and slow each other",
    ]


def test_too_little_memory_is_warned_of() -> None:
    assert memory_warning({"a": LAPTOP}, available_bytes=3 * 2**30) is None
    two = LAPTOP.model_copy(update={"replicas": 2})
    assert memory_warning({"a": two}, available_bytes=3 * 2**30) == (
        "the engines want 4.2 GiB of memory and 3.0 GiB are available; lower num_gpu_blocks_override or replicas"
    )
    assert memory_warning({"a": SERVER}, available_bytes=0) is None


def test_gpus_are_never_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    two = SERVER.model_copy(update={"replicas": 2})
    placements, _ = place_replicas({"a": two}, cores=[0])
    assert [placement.gpus for placement in placements["a"]] == [(0, 1), (2, 3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with pytest.raises(ValueError, match=r"replica 1 of expert 'a' needs 2 GPU\(s\), 0 are left; lower replicas"):
        place_replicas({"a": two}, cores=[0])


def test_formats_without_kernels_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("real.experts.cores._cpu_flags", lambda: frozenset({"avx2"}))
    assert why_not_on_this_cpu("int8") is None
    with pytest.raises(ValueError, match=r"expert 'code': vLLM's awq kernels need AVX-512, which this CPU has not"):
        plan(LAPTOP.model_copy(update={"quantization": "awq"}), Placement(cores=(0,)))
    monkeypatch.setattr("real.experts.cores._cpu_flags", lambda: frozenset({"avx512f"}))
    assert why_not_on_this_cpu("awq") is None


# ---------------------------------------------------------------------------------------------------------- diagnosis


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mem", "too little memory is free for the KV cache; lower num_gpu_blocks_override"),
        ("arch", "vLLM does not know this model's architecture"),
        ("weights", "the checkpoint has no weights"),
        ("port", "its port is in use"),
        ("len", "max_model_len is longer than the checkpoint's"),
        ("path", "there is no such checkpoint"),
    ],
)
def test_logs_of_real_failures_are_told_in_plain_words(name: str, words: str) -> None:
    told = diagnose((LOGS / f"{name}.txt").read_text(), 1)
    assert told.startswith(words)
    assert "(" in told
    assert "ERROR" not in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("/bin/python: No module named 'vllm'", "vLLM is not installed: pip install"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "the model is too large for the memory"),
        ("RuntimeError: Failed to infer device type", "no GPU is found"),
        (
            "ValueError: To serve at least one request with the models's max seq len (8192), (4.0 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (1.0 GiB).",
            "the KV cache is too small for one request",
        ),
        (
            "Traceback ...\nSomeError: a thing broke\nRuntimeError: Engine core initialization failed. See",
            "SomeError: a",
        ),
        (
            "(EngineCore pid=1) ERROR 11-25 23:38:33 1795649913.345762 [multiproc_executor.py:315] Worker proc "
            "VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.\nRuntimeError: Executor failed.",
            "one of its processes crashed or was killed (Worker proc VllmWorker-0 died unexpectedly",
        ),
        ("all was well", "it ended with status 3; the last line of its log: all was well"),
    ],
)
def test_other_failures(log: str, words: str) -> None:
    assert diagnose(log, 3).startswith(words)


def test_a_kill_is_called_one() -> None:
    assert diagnose("", 137) == "it was killed (signal 9), by hand or for want of memory"


def test_an_engine_that_failed_is_noticed_before_its_server_ends() -> None:
    assert has_failed((LOGS / "weights.txt").read_text())
    assert not has_failed((LOGS / "start.txt").read_text())


# ----------------------------------------------------------------------------------------------------------- settings


def test_stages_of_a_start_are_told() -> None:
    lines = (LOGS / "start.txt").read_text().splitlines()
    stages = [stage("\n".join(lines[: count + 1])) for count in range(len(lines))]
    assert list(dict.fromkeys(stages))[:6] == [
        "",
        "LlamaForCausalLM",
        "starting the engine",
        "loading the model",
        "KV cache of 16,512 tokens",
        "starting to listen",
    ]


def test_what_the_engine_resolved_is_read_back() -> None:
    metrics = 'x 1\nvllm:cache_config_info{block_size="128",enable_prefix_caching="True",num_gpu_blocks="129"} 1.0\n'
    report = read_report((LOGS / "start.txt").read_text(), metrics, version="0.32.0", max_model_len=2048)
    assert (report.num_gpu_blocks, report.block_size, report.max_num_seqs) == (129, 128, 64)
    assert (report.max_num_batched_tokens, report.enable_prefix_caching, report.enforce_eager) == (2048, True, True)
    assert report.async_scheduling is False  # asked for, and not there on a CPU
    assert report.dtype == "torch.bfloat16"


def test_what_is_not_said_is_none() -> None:
    report = read_report("", "", version=None, max_model_len=None)
    assert {getattr(report, name) for name in report.__slots__} == {None}
