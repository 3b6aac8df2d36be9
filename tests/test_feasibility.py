"""A fleet that cannot work is refused before it runs: every reason at once, one line each, with the numbers."""

from pathlib import Path

import pytest

from sim.feasibility import check_feasible
from sim.fleet_file import FleetFileError, load_fleet, parse_fleet
from sim.spec import ClassSpec, ClosedLoop, ExpertSpec, Fixed, FleetFile, FleetSpec, WorkloadSpec
from sim.traffic import WorkloadData
from tests.profiles import profile_json

ROOT = Path(__file__).parent.parent
SHIPPED = [*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "sim" / "data" / "quickstart.yaml"]

GOOD = """\
workload:
  classes:
    chat: {prompt_tokens: 512, output_tokens: 128}
    code: {prompt_tokens: 512, output_tokens: {distribution: lognormal, mean: 128, cv: 1, max: 1024}}
  load: {kind: closed_loop, users: [1, 10]}
fleets:
  main:
    router: {workers: 1}
    experts:
      chat: &expert
        model: llama-3-8b
        gpu: H100-SXM
      code: *expert
run: {seed: 1}
"""

DIRECT = GOOD.replace("    router: {workers: 1}\n", "")


def mistakes(text: str) -> list[str]:
    with pytest.raises(FleetFileError) as caught:
        check_feasible(parse_fleet(text))
    return list(caught.value.mistakes)


def mistakes_after(before: str, after: str) -> list[str]:
    assert before in GOOD
    return mistakes(GOOD.replace(before, after))


def test_a_fleet_that_can_work_passes() -> None:
    check_feasible(parse_fleet(GOOD))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_can_work(path: Path) -> None:
    check_feasible(load_fleet(path))


# ------------------------------------------------------------------------------------------------ does the model fit


def test_weights_larger_than_the_gpu_are_refused_with_the_size_that_fits() -> None:
    [line] = mistakes_after("llama-3-8b", "llama-3-70b")

    assert line.startswith("fleets.main.experts.chat.model: llama-3-70b in bf16 at tensor_parallel_size 1 needs 13"), (
        "131 GiB of weights and some activations"
    )
    assert "(131.4 GiB weights), H100-SXM gives 72.8 GiB (0.92 of 79.2 GiB) (line 11)" in line
    assert line.endswith(", smallest tensor_parallel_size that fits: 2")


def test_blocks_set_by_hand_do_not_make_a_model_fit() -> None:
    [line] = mistakes_after("llama-3-8b", "llama-3-70b\n        engine: {num_gpu_blocks_override: 9000}")
    assert line.endswith(", smallest tensor_parallel_size that fits: 2")


def test_a_model_too_large_for_a_laptop_is_not_split_over_its_cores() -> None:
    [line] = mistakes(GOOD.replace("llama-3-8b", "llama-3-70b").replace("H100-SXM", "CPU"))
    assert line.endswith(", take a smaller model or another quantization")


def test_a_kv_cache_smaller_than_one_request_is_refused_with_what_would_fit() -> None:
    text = GOOD.replace("llama-3-8b", "llama-3.1-8b\n        engine: {max_model_len: 131072}")

    [line] = mistakes(text.replace("H100-SXM", "L4"))

    assert line.startswith("fleets.main.experts.chat.engine.max_model_len: the KV cache holds ")
    assert "fewer than one request of max_model_len 131072 (line 12), lower max_model_len to " in line
    assert line.endswith(" or less, smallest tensor_parallel_size that fits: 2")


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (
            "llama-3-8b",
            "llama-3-8b\n        engine: {num_gpu_blocks_override: 100}",
            "fleets.main.experts.chat.engine.num_gpu_blocks_override: 100 blocks of 16 tokens, one of them unusable, "
            "hold 1584 tokens, fewer than one request of max_model_len 8192 (line 12)",
        ),
        (
            "llama-3-8b",
            "llama-3-8b\n        tensor_parallel_size: 3",
            "fleets.main.experts.chat.tensor_parallel_size: 3 does not divide the 32 heads and 8 KV heads of "
            "llama-3-8b (line 12), allowed: 1, 2, 4, 8, 16, 32",
        ),
        (
            "llama-3-8b",
            "llama-3-8b\n        engine: {max_model_len: 16384}",
            "fleets.main.experts.chat.engine.max_model_len: is 16384 tokens, but llama-3-8b takes at most 8192 "
            "(line 12)",
        ),
        (
            "llama-3-8b",
            "llama-3-8b\n        engine: {max_num_seqs: 512, max_num_batched_tokens: 256}",
            "fleets.main.experts.chat.engine: max_num_batched_tokens is 256, fewer than max_num_seqs 512, "
            "which the engine refuses (line 12)",
        ),
        (
            "gpu: H100-SXM",
            "gpu: B200\n        quantization: int8",
            "fleets.main.experts.chat.quantization: int8 does not run on B200 (compute capability 10.0) (line 13), "
            "it needs 7.5 to 9.9",
        ),
        (
            "H100-SXM",
            "H100-SMX",
            "fleets.main.experts.chat.gpu: unknown GPU 'H100-SMX', did you mean 'H100-SXM'? (line 12)",
        ),
        (
            "llama-3-8b",
            "lama-3-8b",
            "fleets.main.experts.chat.model: unknown model 'lama-3-8b', did you mean 'llama-3-8b'? (line 11)",
        ),
    ],
)
def test_an_expert_that_cannot_run_is_refused(before: str, after: str, line: str) -> None:
    assert mistakes_after(before, after) == [line], "told once, although both experts share the anchor"


def test_an_unknown_profile_is_refused() -> None:
    [line] = mistakes_after("llama-3-8b", "llama-3-8b\n        profile: measured")

    assert line.startswith("fleets.main.experts.chat.profile: unknown profile 'measured'")


def test_a_profile_of_another_model_or_gpu_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(profile_json(model="llama-3-70b", gpu="A100", tensor_parallel_size=4))
    text = GOOD.replace("gpu: H100-SXM", f"gpu: H100-SXM\n        profile: '{tmp_path}/other.json'")

    assert mistakes(text) == [
        "fleets.main.experts.chat.profile: profile 'other' was measured with model llama-3-70b, the expert has "
        "llama-3-8b (line 13)",
        "fleets.main.experts.chat.profile: profile 'other' was measured with gpu A100-80GB, the expert has H100-SXM "
        "(line 13)",
        "fleets.main.experts.chat.profile: profile 'other' was measured with tensor_parallel_size 4, the expert has 1 "
        "(line 13)",
    ]


def test_a_broken_profile_is_refused_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    text = GOOD.replace("gpu: H100-SXM", f"gpu: H100-SXM\n        profile: '{tmp_path}/broken.json'")

    [line] = mistakes(text)

    assert line.startswith(f"fleets.main.experts.chat.profile: profile {tmp_path}/broken.json: ")


# ------------------------------------------------------------------------------------------ do the requests fit


def test_a_request_longer_than_max_model_len_is_refused_by_its_largest_length() -> None:
    assert mistakes_after("max: 1024", "max: 9000") == [
        "fleets.main.experts: max_model_len of code is 8192 tokens, but a request of class 'code' can have 9512 "
        "(prompt up to 512, output up to 9000) (line 9)"
    ]


def test_a_class_counts_wherever_a_mistake_of_the_router_can_send_it() -> None:
    text = GOOD.replace("max: 1024", "max: 9000").replace("workers: 1", "confusion: {code: {chat: 1, code: 9}}")

    assert mistakes(text) == [
        "fleets.main.experts: max_model_len of chat, code is 8192 tokens, but a request of class 'code' can have 9512 "
        "(prompt up to 512, output up to 9000) (line 9)"
    ]


@pytest.mark.parametrize(
    ("lengths", "line"),
    [
        (
            "{distribution: lognormal, mean: 512, cv: 1}",
            "workload.classes.chat.prompt_tokens: lognormal lengths without max can exceed every max_model_len "
            "(line 3), add max",
        ),
        (
            "{distribution: exponential, mean: 512}",
            "workload.classes.chat.prompt_tokens: exponential lengths without max can exceed every max_model_len "
            "(line 3), use lognormal with cv 1 and max",
        ),
        ("0", "workload.classes.chat.prompt_tokens: a request has at least 1 token, got 0 (line 3)"),
        (
            "100, shared_prefix_tokens: 200",
            "workload.classes.chat.shared_prefix_tokens: 200 exceeds the longest prompt of the class, 100 tokens "
            "(line 3)",
        ),
    ],
)
def test_lengths_that_mean_nothing_are_refused(lengths: str, line: str) -> None:
    assert mistakes_after("chat: {prompt_tokens: 512", f"chat: {{prompt_tokens: {lengths}") == [line]


def test_a_trace_is_held_against_max_model_len(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,374,44\n2023-11-16 18:15:47.1,9374,44\n"
    )

    lines = mistakes_after("{kind: closed_loop, users: [1, 10]}", f"{{kind: trace, format: azure, file: '{trace}'}}")

    assert lines == [
        "fleets.main.experts: max_model_len of chat, code is 8192 tokens, but the trace has a request of 9418 "
        "(prompt 9374, output 44) (line 9)"
    ]


def test_empirical_lengths_count_by_their_largest_value(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("prompt\n10\n9000\n")
    drawn = f"chat: {{prompt_tokens: {{distribution: empirical, file: '{lengths}', column: prompt"

    assert mistakes_after("chat: {prompt_tokens: 512", drawn + "}") == [
        "fleets.main.experts: max_model_len of chat is 8192 tokens, but a request of class 'chat' can have 9128 "
        "(prompt up to 9000, output up to 128) (line 9)"
    ]
    check_feasible(parse_fleet(GOOD.replace("chat: {prompt_tokens: 512", drawn + ", max: 4000}")))


# ------------------------------------------------------------------------------------------------ is everybody served


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (
            "      code: *expert",
            "      coder: *expert",
            [
                "fleets.main.experts: no expert serves class 'code': without class_map an expert serves the class of "
                "its own name (line 9), known: chat, coder"
            ],
        ),
        (
            "run:",
            "    class_map: {chat: [chat]}\nrun:",
            ["fleets.main.class_map: no expert serves class 'code' (line 14), add 'code: [EXPERT]'"],
        ),
        (
            "run:",
            "    class_map: {chat: [cht], cod: [code], code: []}\nrun:",
            [
                "fleets.main.class_map.chat: unknown expert 'cht' (line 14), did you mean 'chat'?",
                "fleets.main.class_map.cod: unknown class 'cod' (line 14), did you mean 'code'?",
                "fleets.main.class_map.code: is empty, needs at least one expert (line 14), known: chat, code",
            ],
        ),
        (
            "run:",
            "    class_map: {chat: [chat, code, chat], code: [code]}\nrun:",
            ["fleets.main.class_map.chat: names expert 'chat' more than once (line 14)"],
        ),
        (
            "    router: {workers: 1}\n",
            "",
            [
                "fleets.main.router: 2 experts (chat, code) need a router to choose between them (line 7), "
                "add 'router: {}'"
            ],
        ),
        (
            "workers: 1",
            "confusion: {chat: {cod: 1}, coding: {code: 1}, code: {code: 0}}",
            [
                "fleets.main.router.confusion.chat.cod: unknown class 'cod' (line 8), did you mean 'code'?",
                "fleets.main.router.confusion.coding: unknown class 'coding' (line 8), did you mean 'code'?",
                "fleets.main.router.confusion.code: has no weight above 0: prompts of this class would go nowhere "
                "(line 8)",
            ],
        ),
        (
            "workers: 1",
            "spill_over_outstanding: 8",
            [
                "fleets.main.router.spill_over_outstanding: has no meaning with policy class (line 8), "
                "it belongs to class_with_spill_over"
            ],
        ),
        (
            "workers: 1",
            "policy: random, accuracy: 0.9",
            [
                "fleets.main.router.accuracy: has no meaning with policy random, which ignores classes (line 8), "
                "remove it (null removes an inherited one)"
            ],
        ),
        ("users: [1, 10]", "users: [1, 10, 1]", ["workload.load.users: lists 1 more than once (line 5)"]),
        (
            "users: [1, 10]",
            "users: {start: 10, stop: 1, points: 3}",
            ["workload.load.users.stop: must be >= start (10), got 1 (line 5)"],
        ),
        (
            "seed: 1",
            "duration_s: 60, warm_up_s: 60",
            ["run.warm_up_s: 60 s of warm-up leave nothing of a run of 60 s (line 14)"],
        ),
        (
            "run: {seed: 1}",
            "slo: {percentile: 90}",
            ["slo: bounds nothing (line 14), give at least one of ttft_ms, tpot_ms, e2el_ms"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(before: str, after: str, lines: list[str]) -> None:
    assert mistakes_after(before, after) == lines


def test_replicas_without_a_router_are_refused() -> None:
    text = DIRECT.replace("      code: *expert\n", "").replace("gpu: H100-SXM", "gpu: H100-SXM\n        replicas: 4")

    assert mistakes(text) == [
        "fleets.main.experts.chat.replicas: 4 replicas need a router to choose between them (line 12), "
        "add 'router: {}' to the fleet"
    ]


def test_requests_per_user_need_users() -> None:
    text = GOOD.replace("{kind: closed_loop, users: [1, 10]}", "{kind: open_loop, rate_rps: 5}")

    assert mistakes(text.replace("seed: 1", "requests_per_user: 5")) == [
        "run.requests_per_user: has no meaning: a load of kind open_loop has no users (line 14), "
        "give requests or duration_s"
    ]


def test_mistakes_of_all_kinds_are_told_at_once() -> None:
    text = (
        GOOD.replace("H100-SXM", "H100")
        .replace("llama-3-8b", "llama-9")
        .replace("seed: 1", "warm_up_s: 9, duration_s: 3")
    )

    assert [line.split(":")[0] for line in mistakes(text)] == ["run.warm_up_s", "fleets.main.experts.chat.model"]


def test_a_file_built_in_python_is_told_without_lines() -> None:
    one = ClassSpec(prompt_tokens=Fixed(value=512), output_tokens=Fixed(value=9000))
    file = FleetFile(
        workload=WorkloadSpec(classes={"chat": one}, load=ClosedLoop(users=1)),
        fleets={"main": FleetSpec(experts={"chat": ExpertSpec(model="llama-3-8b", gpu="H100")})},
    )

    with pytest.raises(FleetFileError) as caught:
        check_feasible(file, WorkloadData())

    assert caught.value.mistakes == (
        "fleets.main.experts: max_model_len of chat is 8192 tokens, but a request of class 'chat' can have 9512 "
        "(prompt up to 512, output up to 9000)",
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("quantization=fp8", "fp8 does not run on CPUs"),
        ("engine.block_size=16", "on CPUs vLLM takes multiples of 32"),
    ],
)
def test_what_a_cpu_cannot_is_told_before_anything_starts(change: str, told: str) -> None:
    file = load_fleet(ROOT / "examples" / "laptop.yaml", [f"fleets.laptop.experts.code.{change}"])
    with pytest.raises(FleetFileError, match=told):
        check_feasible(file)
