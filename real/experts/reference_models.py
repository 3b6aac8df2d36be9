"""Reference models: checkpoints in a catalogue model's true shape, for machines without its weights.

A folder with configuration and tokenizer and no weights. vLLM fills such a model with random numbers
(``load_format=dummy``): what it says is noise, what it takes in time and memory is the real model's.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sim.catalogue import ModelShape, find_model, find_quantization, models
from sim.run import program_version

MANIFEST = "expert-router.json"

_FORMAT = 1  # of the folder; a folder of another number is made anew

_GROUP_SIZE = 128  # weights that share a scale in the 4-bit formats, as the catalogue counts them

_BLOCK_LINEAR_LAYERS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """A reference model on disk.

    Attributes:
        tokenizer_tokens: tokens that its tokenizer learned; the rest of the vocabulary is reserved.
    """

    model: str
    quantization: str
    folder: Path
    vocab_size: int
    tokenizer_tokens: int


def make_reference_model(model: str, quantization: str = "bf16", folder: Path | None = None) -> ReferenceModel:
    """Write a reference model, replacing what the folder held.

    Args:
        model: a catalogue model of a Llama shape, by name or alias.
        quantization: ``bf16``, ``int8``, ``awq``, ``gptq`` or ``fp8``, or an alias.
        folder: None: ``default_folder``'s.

    Raises:
        UnknownNameError: the catalogue lacks a name.
        ValueError: the shape is no Llama's, the format does not divide it, or the folder is somebody else's.
    """
    from real.experts.reference_tokenizer import CHAT_TEMPLATE, END_OF_TURN, train_tokenizer

    shape, quantization = find_model(model), find_quantization(quantization).name
    _check_shape(shape, quantization)
    if folder is None:
        folder = default_folder(shape.name, quantization)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no reference model: give another --out, or remove it")
    tokenizer = train_tokenizer(shape.vocab_size)
    ids = tokenizer.special_ids
    begin, end, end_of_turn = (ids[name] for name in ("<|begin_of_text|>", "<|end_of_text|>", END_OF_TURN))
    files: dict[str, Any] = {
        "config.json": model_config(shape, quantization) | {"bos_token_id": begin, "eos_token_id": [end, end_of_turn]},
        "generation_config.json": _generation_config(shape, begin, [end, end_of_turn]),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": END_OF_TURN,
            "pad_token": "<|finetune_right_pad_id|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": shape.max_model_len,
        },
        "special_tokens_map.json": {
            "bos_token": "<|begin_of_text|>",
            "eos_token": END_OF_TURN,
            "pad_token": "<|finetune_right_pad_id|>",
        },
        MANIFEST: {
            "format": _FORMAT,
            "made_by": f"expert-router {program_version()}",
            "model": shape.name,
            "quantization": quantization,
            "weights": "none: random ones, with load_format=dummy",
            "parameters": shape.parameters_total,
            "shape": asdict(shape),
            "tokenizer": {"tokens_learned": tokenizer.learned_tokens, "text_sha256": tokenizer.text_sha256},
        },
    }
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    _write_folder(folder, texts | {"tokenizer.json": tokenizer.text})
    return _read(folder)


def ensure_reference_model(model: str, quantization: str) -> tuple[ReferenceModel, bool]:
    """Return the reference model in its default folder and whether it had to be made."""
    folder = default_folder(find_model(model).name, find_quantization(quantization).name)
    manifest = _manifest(folder)
    if manifest is not None and manifest["shape"] == json.loads(json.dumps(asdict(find_model(model)))):
        return _read(folder), False
    return make_reference_model(model, quantization, folder), True


def models_folder() -> Path:
    """Return where reference models are kept: ``models`` in $EXPERT_ROUTER_HOME, or else in ~/.cache/expert-router."""
    home = os.environ.get("EXPERT_ROUTER_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "expert-router") / "models"


def default_folder(model: str, quantization: str) -> Path:
    """Return the folder of a reference model, by the catalogue's names."""
    return models_folder() / f"{model}-{quantization}"


def made_models() -> list[ReferenceModel]:
    """Return the reference models in the default place."""
    if not models_folder().is_dir():
        return []
    return [_read(path) for path in sorted(models_folder().iterdir()) if _manifest(path) is not None]


def is_reference_model(folder: Path) -> bool:
    """Whether a folder is a reference model, which has no weights."""
    return _manifest(folder) is not None


def llama_shapes() -> list[ModelShape]:
    """Return the catalogue's models whose shape is a Llama's."""
    return [shape for shape in models().values() if _why_not_llama(shape) is None]


# ------------------------------------------------------------------------------------------------------ the contents


def model_config(shape: ModelShape, quantization: str) -> dict[str, Any]:
    """Return ``config.json`` of a shape in a quantization, its special tokens left out."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.attention_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_model_len,
        "tie_word_embeddings": shape.tied_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
    }
    stored = _quantization_config(quantization)
    return config if stored is None else config | {"quantization_config": stored}


def _quantization_config(quantization: str) -> dict[str, Any] | None:
    """``quantization_config`` as the tools that quantize write it. Only the blocks' linear layers are quantized."""
    if quantization == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": _GROUP_SIZE,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    if quantization == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": _GROUP_SIZE,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
            # vLLM would otherwise look into the weights for what is quantized, and find nothing.
            "modules_in_block_to_quantize": _BLOCK_LINEAR_LAYERS,
        }
    if quantization in ("int8", "fp8"):
        number = "int" if quantization == "int8" else "float"
        common = {"num_bits": 8, "type": number, "symmetric": True}
        return {
            "quant_method": "compressed-tensors",
            "format": f"{number}-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": common | {"strategy": "channel", "dynamic": False},
                    "input_activations": common | {"strategy": "token", "dynamic": True},
                    "output_activations": None,
                }
            },
        }
    return None


def _generation_config(shape: ModelShape, begin: int, ends: list[int]) -> dict[str, Any]:
    """Sampling defaults with the filter that the model's own have; their values are Llama 3's."""
    config: dict[str, Any] = {"bos_token_id": begin, "eos_token_id": ends, "do_sample": True, "temperature": 0.6}
    if shape.default_sampling == "top_p":
        config["top_p"] = 0.9
    if shape.default_sampling == "top_k":
        config["top_k"] = 20
    return config


# -------------------------------------------------------------------------------------------------------- the checks


def _check_shape(shape: ModelShape, quantization: str) -> None:
    reason = _why_not_llama(shape)
    if reason is not None:
        known = ", ".join(each.name for each in llama_shapes())
        raise ValueError(f"{shape.name} has {reason}, which a Llama has not; reference models: {known}")
    narrow = [size for size in (shape.hidden_size, shape.query_size, shape.intermediate_size) if size % _GROUP_SIZE]
    if quantization in ("awq", "gptq") and narrow:
        raise ValueError(f"{shape.name} cannot be {quantization}: {narrow[0]} inputs are no multiple of {_GROUP_SIZE}")


def _why_not_llama(shape: ModelShape) -> str | None:
    if shape.experts_total > 1:
        return f"{shape.experts_total} experts a layer"
    if shape.qkv_bias:
        return "biases in its attention"
    return "normalised queries and keys" if shape.qk_norm else None


# ------------------------------------------------------------------------------------------------------------- files


def _write_folder(folder: Path, texts: dict[str, str]) -> None:
    """Write all files beside the folder, then put them in its place, so that nobody ever reads half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _read(folder: Path) -> ReferenceModel:
    manifest = _manifest(folder)
    assert manifest is not None, folder
    return ReferenceModel(
        model=manifest["model"],
        quantization=manifest["quantization"],
        folder=folder,
        vocab_size=manifest["shape"]["vocab_size"],
        tokenizer_tokens=manifest["tokenizer"]["tokens_learned"],
    )


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == _FORMAT else None
