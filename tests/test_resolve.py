"""A fleet is resolved to what vLLM would run: its defaults, its clamps, its KV blocks, and who serves which class."""

from pathlib import Path

import pytest

from sim.catalogue import UnknownNameError
from sim.fleet import EngineSettings, Fleet, FrontEnd
from sim.fleet_file import parse_fleet
from sim.profile import FrontEndCosts, Parameter, ProfileError
from sim.resolve import engine_settings, resolve_expert, resolve_fleet
from sim.roofline import default_front_end
from sim.service_curve import IterationWork
from sim.spec import EngineSpec, ExpertSpec, FrontEndSpec
from tests.profiles import profile_json

WORK = IterationWork(0, 0, 0.0, 0, 1, 100)


def settings(gpu: str = "H100-SXM", model: str = "llama-3-8b", **engine: object) -> EngineSettings:
    return engine_settings(ExpertSpec(model=model, gpu=gpu, engine=EngineSpec.model_validate(engine)))


def fleet(experts: str, rest: str = "") -> Fleet:
    text = f"""
x-expert: &expert {{model: llama-3-8b, gpu: H100-SXM}}
workload:
  classes:
    chat: {{prompt_tokens: 512, output_tokens: 128}}
    code: {{prompt_tokens: 512, output_tokens: 128}}
  load: {{kind: closed_loop, users: 1}}
fleets:
  main: {{experts: {experts}, {rest}}}
"""
    return resolve_fleet(parse_fleet(text), "main")


# ------------------------------------------------------------------------------------------------- engine settings


@pytest.mark.parametrize(
    ("gpu", "tokens", "seqs"),
    [
        ("H100-SXM", 8192, 1024),
        ("H200", 8192, 1024),
        ("B200", 16384, 1024),
        ("A100-80GB", 2048, 256),
        ("L40S", 2048, 256),
        ("RTX-4090", 2048, 256),
    ],
)
def test_batch_limits_default_to_what_a_vllm_server_takes_on_the_gpu(gpu: str, tokens: int, seqs: int) -> None:
    resolved = settings(gpu)

    assert (resolved.max_num_batched_tokens, resolved.max_num_seqs) == (tokens, seqs)


def test_default_token_budget_is_at_most_what_all_sequences_can_have() -> None:
    assert settings(max_num_seqs=4, max_model_len=512).max_num_batched_tokens == 2048


def test_default_sequence_limit_is_at_most_the_token_budget() -> None:
    assert settings(max_num_batched_tokens=512).max_num_seqs == 512


@pytest.mark.parametrize(("model", "tokens"), [("llama-2-7b", 4096), ("llama-3-8b", 8192), ("llama-3.1-8b", 8192)])
def test_max_model_len_defaults_to_the_models_own_and_at_most_8192(model: str, tokens: int) -> None:
    assert settings(model=model).max_model_len == tokens


def test_what_the_file_states_is_kept() -> None:
    resolved = settings(
        max_num_seqs=7, max_num_batched_tokens=700, max_model_len=900, block_size=32, enable_prefix_caching=False
    )

    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens, resolved.max_model_len) == (7, 700, 900)
    assert (resolved.block_size, resolved.enable_prefix_caching) == (32, False)


def test_of_overridden_kv_blocks_one_is_the_null_block() -> None:
    assert settings(num_gpu_blocks_override=1001).num_kv_blocks == 1000


def test_kv_blocks_fill_what_the_weights_leave() -> None:
    bytes_per_block = 16 * 2 * 32 * 8 * 128 * 2  # tokens, K and V, layers, heads, head size, bf16
    kv_gib = settings().num_kv_blocks * bytes_per_block / 2**30

    assert 45 < kv_gib < 58, "of 72.8 GiB the weights take 15, activations and graphs a few"


def test_a_model_that_leaves_no_kv_cache_cannot_be_resolved() -> None:
    with pytest.raises(ValueError, match=r"^llama-3-70b \(bf16\) leaves no room for a KV cache on L4$"):
        settings(model="llama-3-70b", gpu="L4")


# --------------------------------------------------------------------------------------------------------- experts


def test_an_expert_is_named_as_the_catalogue_does_and_costs_all_its_gpus() -> None:
    spec = ExpertSpec(model="meta-llama/Llama-3.1-70B", gpu="h100", tensor_parallel_size=4, replicas=2)
    price = resolve_expert("one", ExpertSpec(model="llama-3-8b", gpu="H100-SXM")).price_per_hour

    expert = resolve_expert("big", spec)

    assert (expert.model, expert.gpu, expert.quantization) == ("llama-3.1-70b", "H100-SXM", "bf16")
    assert expert.gpus == 8
    assert price is not None
    assert expert.price_per_hour == pytest.approx(8 * price)


def test_without_a_profile_the_curve_is_the_roofline_and_says_so() -> None:
    expert = resolve_expert("chat", ExpertSpec(model="llama-3-8b", gpu="H100-SXM"))

    assert expert.curve.source.label == "roofline, not calibrated"
    assert expert.front_end == default_front_end()


def test_a_quantized_model_is_smaller_and_decodes_faster() -> None:
    bf16, fp8 = (
        resolve_expert("chat", ExpertSpec(model="llama-3-8b", gpu="H100-SXM", quantization=quantization))
        for quantization in ("bf16", "fp8")
    )

    assert fp8.engine.num_kv_blocks > bf16.engine.num_kv_blocks
    assert fp8.curve.iteration_s(WORK) < bf16.curve.iteration_s(WORK)


def test_a_profile_replaces_the_roofline_and_its_front_end(tmp_path: Path) -> None:
    measured = FrontEndCosts(
        delay_s=Parameter(value=0.0, assumed="none"),
        per_request_s=Parameter(value=1e-3, low=9e-4, high=1.1e-3),
        per_prompt_token_s=Parameter(value=2e-6, assumed="made up"),
        per_output_token_s=Parameter(value=3e-5, low=2e-5, high=4e-5),
    )
    (tmp_path / "h100.json").write_text(profile_json(model="llama-3-8b", gpu="H100-SXM", front_end=measured))

    expert = resolve_expert("chat", ExpertSpec(model="llama-3-8b", gpu="H100-SXM", profile=str(tmp_path / "h100.json")))

    assert expert.curve.source.label == "other"
    assert expert.curve.iteration_s(WORK) == 0.01
    assert expert.front_end == FrontEnd(per_request_s=1e-3, per_prompt_token_s=2e-6, per_output_token_s=3e-5)


def test_front_end_figures_of_the_file_go_first() -> None:
    spec = ExpertSpec(model="llama-3-8b", gpu="H100-SXM", front_end=FrontEndSpec(per_request_s=0.0))

    front_end = resolve_expert("chat", spec).front_end

    assert front_end.per_request_s == 0.0
    assert front_end.per_output_token_s == default_front_end().per_output_token_s


def test_names_that_nobody_has_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown GPU 'H100-SMX', did you mean 'H100-SXM'"):
        resolve_expert("chat", ExpertSpec(model="llama-3-8b", gpu="H100-SMX"))
    with pytest.raises(ProfileError, match="unknown profile 'none-such'"):
        resolve_expert("chat", ExpertSpec(model="llama-3-8b", gpu="H100-SXM", profile="none-such"))


# ---------------------------------------------------------------------------------------------------- who serves whom


def test_one_expert_serves_every_class() -> None:
    assert fleet("{only: *expert}").class_map == ((0,), (0,))


def test_of_several_experts_each_serves_the_class_of_its_name() -> None:
    assert fleet("{code: *expert, chat: *expert}", "router: {}").class_map == ((1,), (0,))


def test_a_class_map_names_the_preferred_expert_and_its_fallbacks() -> None:
    resolved = fleet("{a: *expert, b: *expert, c: *expert}", "router: {}, class_map: {code: [c, a], chat: [b]}")

    assert resolved.class_map == ((1,), (2, 0)), "in the order of the workload's classes"


def test_a_policy_that_ignores_classes_needs_no_class_map() -> None:
    assert fleet("{a: *expert, b: *expert}", "router: {policy: random}").class_map == ((0, 1), (0, 1))
