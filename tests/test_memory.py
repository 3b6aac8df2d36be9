import csv
import os
from pathlib import Path

import pytest

from sim.catalogue import UnknownNameError, find_gpu, find_model, find_quantization
from sim.cuda_graphs import capture_sizes
from sim.memory import (
    MemoryBudget,
    block_size_of,
    engine_defaults,
    kv_bytes_per_token,
    memory_budget,
    overlaps_scheduling,
    weight_bytes_per_gpu,
)
from sim.spec import EngineSpec

GROUND_TRUTH = Path(
    os.environ.get("EXPERT_ROUTER_GROUND_TRUTH") or Path(__file__).parents[2] / "shared" / "ground_truth"
)
RUNS = GROUND_TRUTH / "serving_runs.csv"

NOT_IN_CATALOGUE = {
    # a multimodal mixture with attention in chunks and FP8 experts; which of these sets its blocks was not established
    "RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic",
}


def measured_blocks() -> list[dict[str, str]]:
    """Return one row for each distinct engine with measured KV blocks."""
    columns = (
        "engine_version",
        "model",
        "gpu",
        "tp",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_mem_util",
        "block_size",
        "kv_blocks",
    )
    with RUNS.open(encoding="utf-8", newline="") as file:
        rows = [{column: row[column] for column in columns} for row in csv.DictReader(file) if row["kv_blocks"]]
    return list({tuple(row.values()): row for row in rows}.values())


@pytest.mark.skipif(
    not RUNS.is_file(), reason=f"no {RUNS}; set EXPERT_ROUTER_GROUND_TRUTH to the folder with serving_runs.csv"
)
def test_kv_blocks_are_within_five_percent_of_every_measured_engine() -> None:
    errors = {}
    for row in measured_blocks():
        if row["model"] in NOT_IN_CATALOGUE:
            with pytest.raises(UnknownNameError):
                find_model(row["model"])
            continue
        # The model follows vLLM 0.32, which takes an estimate of the graphs out of the budget. The runs are of 0.11 to
        # 0.19; that these set nothing aside is inferred from the two engines with the fewest blocks, which come out 7
        # and 11 % too small otherwise.
        engine = EngineSpec(
            gpu_memory_utilization=float(row["gpu_mem_util"]),
            block_size=int(float(row["block_size"])),
            enforce_eager=True,
        )
        budget = memory_budget(
            find_model(row["model"]),
            find_quantization("bf16"),
            find_gpu(row["gpu"].removesuffix(" (inferred)")),
            tensor_parallel_size=int(row["tp"]),
            engine=engine,
            max_num_batched_tokens=int(float(row["max_num_batched_tokens"])),
            max_num_seqs=int(row["max_num_seqs"]),
        )
        measured = int(float(row["kv_blocks"])) - 1  # the engine counts its null block
        label = f"{row['model']} TP {row['tp']} budget {row['max_num_batched_tokens']} on {row['gpu']}"
        errors[label] = budget.num_kv_blocks / measured - 1
    print(*(f"{error:+.1%} {label}" for label, error in errors.items()), sep="\n")
    assert len(errors) >= 12
    assert {label: f"{error:+.1%}" for label, error in errors.items() if abs(error) > 0.05} == {}


def budget_of(model: str, gpu: str, *, quantization: str = "bf16", tp: int = 1, **engine: object) -> MemoryBudget:
    tokens, seqs = engine_defaults(find_gpu(gpu))
    return memory_budget(
        find_model(model),
        find_quantization(quantization),
        find_gpu(gpu),
        tensor_parallel_size=tp,
        engine=EngineSpec.model_validate(engine),
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
    )


def test_parts_add_up_to_what_was_requested() -> None:
    budget = budget_of("llama-3-8b", "H100-SXM")
    parts = budget.weight_bytes + budget.activation_bytes + budget.overhead_bytes + budget.cuda_graph_bytes
    assert parts + budget.kv_cache_bytes == budget.requested_bytes
    assert budget.num_kv_blocks == budget.kv_cache_bytes // budget.kv_block_bytes - 1


def test_70b_does_not_fit_one_80_gb_gpu_and_says_so_without_raising() -> None:
    assert budget_of("llama-3-70b", "H100-SXM").num_kv_blocks < 1
    assert budget_of("llama-3-70b", "H100-SXM", quantization="awq").num_kv_blocks > 1000
    assert budget_of("llama-3-70b", "H100-SXM", tp=4).num_kv_blocks > 1000


def test_fp8_kv_cache_halves_a_block() -> None:
    full, half = budget_of("llama-3-8b", "L4"), budget_of("llama-3-8b", "L4", kv_cache_dtype="fp8")
    assert half.kv_block_bytes * 2 == full.kv_block_bytes


def test_override_counts_the_null_block() -> None:
    assert budget_of("llama-3-8b", "H100-SXM", num_gpu_blocks_override=1000).num_kv_blocks == 999


def test_eager_engine_sets_nothing_aside_for_graphs() -> None:
    assert budget_of("llama-3-8b", "H100-SXM", enforce_eager=True).cuda_graph_bytes == 0


def test_bf16_weights_on_one_gpu_are_two_bytes_a_parameter() -> None:
    for name in ("llama-3-8b", "llama-3.2-1b", "mixtral-8x7b", "qwen2.5-7b"):
        model = find_model(name)
        assert weight_bytes_per_gpu(model, find_quantization("bf16"), 1) == 2 * model.parameters_total


def test_quantized_70b_keeps_embeddings_in_bf16() -> None:
    model = find_model("llama-3-70b")
    quarter_bytes = weight_bytes_per_gpu(model, find_quantization("awq"), 1)
    assert quarter_bytes > model.parameters_total * 4.15625 / 8 + 2 * model.embedding_weights * 1.4


@pytest.mark.parametrize(
    ("gpu", "defaults"),
    [
        ("A100-80GB", (2048, 256)),
        ("A100-40GB", (2048, 256)),
        ("L4", (2048, 256)),
        ("H100-SXM", (8192, 1024)),
        ("H200", (8192, 1024)),
        ("B200", (16384, 1024)),
        ("MI300X", (16384, 1024)),
    ],
)
def test_engine_defaults_follow_the_memory_and_not_for_a100(gpu: str, defaults: tuple[int, int]) -> None:
    assert engine_defaults(find_gpu(gpu)) == defaults


def test_default_budget_is_clamped_to_all_sequences_at_full_length() -> None:
    assert engine_defaults(find_gpu("H100-SXM"), max_model_len=512, max_num_seqs=4) == (2048, 4)


def test_default_sequences_are_clamped_to_the_budget_given() -> None:
    assert engine_defaults(find_gpu("H100-SXM"), max_num_batched_tokens=64) == (64, 64)


def test_values_given_are_kept() -> None:
    given = engine_defaults(find_gpu("H100-SXM"), max_model_len=64, max_num_batched_tokens=4096, max_num_seqs=2)
    assert given == (4096, 2)


def test_a_cpu_has_vllms_defaults_for_cpus() -> None:
    cpu = find_gpu("cpu")
    assert engine_defaults(cpu) == (2048, 128)
    assert block_size_of(EngineSpec(), cpu) == 128
    assert not overlaps_scheduling(EngineSpec(async_scheduling=True), cpu)
    assert capture_sizes(max_num_seqs=64, max_num_batched_tokens=2048, gpu=cpu) == ()


def test_float32_doubles_what_is_not_quantized() -> None:
    model = find_model("laptop-37m")
    plain, int8 = find_quantization("bf16"), find_quantization("int8")
    assert weight_bytes_per_gpu(model, plain, 1, "float32") == pytest.approx(4 * model.parameters_total)
    assert weight_bytes_per_gpu(model, int8, 1, "float32") < 2 * model.parameters_total
    kv = kv_bytes_per_token(model, tensor_parallel_size=1)
    assert kv_bytes_per_token(model, tensor_parallel_size=1, dtype="float32") == 2 * kv
