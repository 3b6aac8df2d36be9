"""A reference model has the catalogue's shape to the last weight, and a tokenizer of exactly its vocabulary."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from real.experts.checkpoints import find_checkpoint
from real.experts.reference_models import (
    MANIFEST,
    ensure_reference_model,
    is_reference_model,
    llama_shapes,
    made_models,
    make_reference_model,
    model_config,
)
from sim.catalogue import find_model
from sim.cli import main
from sim.spec import ExpertSpec

tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers package comes with the extras cpu and gpu")

from real.experts.reference_tokenizer import special_tokens, train_tokenizer  # noqa: E402

TEXTS = [
    "Write a function that adds 12345 and 6.",
    "  indented\n\n\ttabs\r\n  and trailing  ",
    "Ünïcödé, 你好, 🙂 and \x00 bytes",
    "",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPERT_ROUTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def weights_of(config: dict[str, int]) -> int:
    """Parameters that Llama's architecture has by its ``config.json``, counted anew."""
    hidden, head = config["hidden_size"], config["head_dim"]
    attention = 2 * hidden * head * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    matrices = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + matrices * config["vocab_size"] * hidden + hidden


@pytest.mark.parametrize("shape", llama_shapes(), ids=lambda shape: shape.name)
def test_a_configuration_counts_as_many_weights_as_the_catalogue(shape) -> None:  # type: ignore[no-untyped-def]
    assert weights_of(model_config(shape, "bf16")) == shape.parameters_total


def test_other_architectures_are_refused() -> None:
    for name, reason in (("qwen2.5-7b", "biases"), ("qwen3-8b", "normalised"), ("mixtral-8x7b", "8 experts")):
        with pytest.raises(ValueError, match=rf"{name} has {reason}.*which a Llama has not; reference models: llama-3"):
            make_reference_model(name)


@pytest.mark.parametrize("vocab_size", [512, 8192, 128256])
def test_a_tokenizer_has_exactly_the_vocabulary_asked_for(vocab_size: int) -> None:
    trained = train_tokenizer(vocab_size)
    tokenizer = tokenizers.Tokenizer.from_str(trained.text)
    assert tokenizer.get_vocab_size(with_added_tokens=True) == trained.vocab_size == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert [tokenizer.id_to_token(vocab_size - 256 + place) for place in range(256)] == special_tokens()


def test_text_comes_back_as_it_went_in() -> None:
    tokenizer = tokenizers.Tokenizer.from_str(train_tokenizer(8192).text)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.id_to_token(ids[0]) == "<|begin_of_text|>"
        assert tokenizer.decode(ids) == text


def test_english_takes_few_tokens() -> None:
    text = "The router sends each prompt to the expert of its class and streams the answer back to the user."
    ids = tokenizers.Tokenizer.from_str(train_tokenizer(8192).text).encode(text).ids
    assert len(text) / len(ids) > 3


def test_equal_calls_write_equal_bytes(tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        train_tokenizer.cache_clear()
        folders.append(make_reference_model("laptop-16m", "int8", tmp_path / name).folder)
    first, second = ({path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in folders)
    assert first == second
    assert first.keys() == {
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        MANIFEST,
    }


def test_quantization_configs_are_those_that_vllm_knows() -> None:
    shape = find_model("llama-3-8b")
    assert "quantization_config" not in model_config(shape, "bf16")
    methods = {name: model_config(shape, name)["quantization_config"] for name in ("int8", "awq", "gptq", "fp8")}
    assert {name: config["quant_method"] for name, config in methods.items()} == {
        "int8": "compressed-tensors",
        "fp8": "compressed-tensors",
        "awq": "awq",
        "gptq": "gptq",
    }
    weights = methods["int8"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["type"], weights["strategy"]) == (8, "int", "channel")
    assert methods["awq"]["group_size"] == methods["gptq"]["group_size"] == 128


def test_a_model_is_made_once(home: Path) -> None:
    made, fresh = ensure_reference_model("laptop-16m", "bf16")
    assert (fresh, made.folder) == (True, home / "laptop-16m-bf16")
    assert ensure_reference_model("LAPTOP-16M", "none") == (made, False)
    assert made_models() == [made]
    assert is_reference_model(made.folder)


def test_a_model_whose_shape_is_no_longer_the_catalogues_is_made_anew() -> None:
    made, _ = ensure_reference_model("laptop-16m", "bf16")
    manifest = json.loads((made.folder / MANIFEST).read_text())
    manifest["shape"]["layers"] += 1
    (made.folder / MANIFEST).write_text(json.dumps(manifest))
    assert ensure_reference_model("laptop-16m", "bf16")[1]


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no reference model: give another --out"):
        make_reference_model("laptop-16m", folder=tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_command_makes_and_lists(home: Path) -> None:
    made = CliRunner().invoke(main, ["models", "make", "laptop-16m", "--quantization", "awq"])
    assert made.exit_code == 0, made.output
    assert made.stdout.strip() == str(home / "laptop-16m-awq")
    assert "no weights, random ones when served" in made.stderr
    listed = CliRunner().invoke(main, ["models", "list"])
    assert "laptop-16m" in listed.stdout
    assert "awq" in listed.stdout


def test_a_mistake_is_one_line() -> None:
    result = CliRunner().invoke(main, ["models", "make", "laptop-16"])
    assert result.exit_code == 2
    assert result.stderr == "unknown model 'laptop-16', did you mean 'laptop-16m'?\n"


# ---------------------------------------------------------------------------------------------------- an expert's own


def test_an_expert_without_a_checkpoint_gets_random_weights_of_its_shape(home: Path) -> None:
    expert = ExpertSpec(model="laptop-16m", quantization="int8", gpu="CPU")
    found = find_checkpoint("chat", expert)
    assert (found.place, found.random_weights) == (str(home / "laptop-16m-int8"), True)
    assert found.told.startswith("random weights in the shape of laptop-16m, int8 (made ")


def test_a_checkpoint_of_another_shape_is_told(tmp_path: Path) -> None:
    folder = make_reference_model("laptop-16m", "int8", tmp_path / "small").folder
    expert = ExpertSpec(model="laptop-37m", gpu="CPU", checkpoint=str(folder))
    found = find_checkpoint("chat", expert)
    assert found.random_weights
    assert "expert chat: the checkpoint's hidden_size is 384, laptop-37m has 512" in found.warnings
    assert "expert chat: the checkpoint is int8, the fleet file says bf16" in found.warnings


def test_a_folder_that_is_no_checkpoint_is_told_before_anything_starts(tmp_path: Path) -> None:
    expert = ExpertSpec(model="laptop-37m", gpu="CPU", checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match=r"expert 'chat': checkpoint '.*' is a folder without config.json"):
        find_checkpoint("chat", expert)


def test_a_name_is_looked_up_on_the_hub_and_a_missing_folder_is_not() -> None:
    expert = ExpertSpec(model="llama-3-8b", gpu="H100-SXM", checkpoint="meta-llama/Meta-Llama-3-8B")
    found = find_checkpoint("chat", expert)
    assert (found.place, found.random_weights, found.is_local) == ("meta-llama/Meta-Llama-3-8B", False, False)
    missing = expert.model_copy(update={"checkpoint": "./missing"})
    with pytest.raises(ValueError, match=r"expert 'chat': checkpoint './missing' is no folder"):
        find_checkpoint("chat", missing)
