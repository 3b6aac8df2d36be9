from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sim.catalogue import (
    UnknownNameError,
    find_gpu,
    find_model,
    find_quantization,
    gpus,
    models,
    quantizations,
)

PUBLISHED = {
    entry["name"]: entry["parameters"]
    for entry in yaml.safe_load(resources.files("sim").joinpath("data", "models.yaml").read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_has_exactly_the_published_number_of_parameters(name: str) -> None:
    assert find_model(name).parameters_total == PUBLISHED[name]


def test_mixture_passes_two_of_eight_experts_per_token() -> None:
    mixtral = find_model("mixtral-8x7b")
    per_expert = 32 * mixtral.mlp_weights_per_expert
    assert mixtral.parameters_total - mixtral.parameters_active == 6 * per_expert


def test_dense_model_uses_all_parameters() -> None:
    llama = find_model("llama-3-8b")
    assert llama.parameters_active == llama.parameters_total


def test_kv_values_of_llama_3_8b_per_token() -> None:
    assert find_model("llama-3-8b").kv_values_per_token == 2 * 32 * 8 * 128


@pytest.mark.parametrize(
    ("size", "allowed"),
    [(1, True), (2, True), (4, True), (8, True), (16, True), (3, False), (6, False)],
)
def test_tensor_parallel_must_divide_heads_and_mlp(size: int, allowed: bool) -> None:
    assert find_model("llama-3-70b").allows_tensor_parallel(size) is allowed


def test_kv_heads_are_kept_several_times_when_gpus_outnumber_them() -> None:
    assert find_model("llama-3-70b").kv_heads_per_gpu(16) == 1


def test_aliases_and_case_do_not_matter() -> None:
    assert find_model("META-LLAMA/llama-3.1-8b-instruct") is find_model("llama-3.1-8b")
    assert find_gpu("h100") is find_gpu("H100-SXM-80GB")
    assert find_quantization("FP16").name == "bf16"


def test_every_name_and_alias_is_unique() -> None:
    for entries in (models(), gpus(), quantizations()):
        words = [word.casefold() for entry in entries.values() for word in (entry.name, *entry.aliases)]
        assert len(words) == len(set(words))


def test_every_entry_names_its_source() -> None:
    for entries in (models(), gpus(), quantizations()):
        assert all(entry.source for entry in entries.values())


def test_near_miss_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"^unknown GPU 'H100-SMX', did you mean 'H100-SXM'\?$") as caught:
        find_gpu("H100-SMX")
    assert (caught.value.kind, caught.value.value, caught.value.suggestions[0]) == ("GPU", "H100-SMX", "H100-SXM")


def test_far_miss_lists_what_is_known() -> None:
    with pytest.raises(UnknownNameError, match="unknown quantization 'xyzzy'; known: bf16, fp8, int8, awq, gptq"):
        find_quantization("xyzzy")


@given(st.text(max_size=40))
def test_any_text_is_found_or_refused(text: str) -> None:
    try:
        assert find_model(text).name in models()
    except UnknownNameError as error:
        assert repr(text) in str(error)  # noqa: PT017 - either outcome is right, no other exception is


def test_fp8_computes_in_bf16_where_the_gpu_has_no_fp8() -> None:
    fp8 = find_quantization("fp8")
    assert fp8.compute_on(find_gpu("A100-80GB")) == "bf16"
    assert fp8.compute_on(find_gpu("H100-SXM")) == "fp8"


def test_int8_is_refused_on_blackwell() -> None:
    assert not find_quantization("int8").supported_on(find_gpu("B200"))
    assert find_quantization("int8").supported_on(find_gpu("A100-80GB"))
