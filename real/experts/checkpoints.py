"""Where an expert's weights come from, and whether they are what the fleet file says they are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real.experts.reference_models import ensure_reference_model, is_reference_model, model_config
from sim.catalogue import find_model, find_quantization
from sim.spec import ExpertSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What vLLM is told to load.

    Attributes:
        place: a folder, or a name on the hub.
        random_weights: it has none; vLLM fills the model with random numbers.
        told: one line for the user, about where it is from.
        warnings: in what it differs from the fleet file.
    """

    place: str
    random_weights: bool
    told: str
    warnings: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, for which the hub need not be asked."""
        return Path(self.place).is_dir()


def find_checkpoint(name: str, expert: ExpertSpec) -> Checkpoint:
    """Return an expert's checkpoint; a reference model is made when none is given and it is not there yet.

    Raises:
        ValueError: there is no such folder, it is no checkpoint, or there is no reference model of this shape.
    """
    shape, quantization = find_model(expert.model), find_quantization(expert.quantization)
    if expert.checkpoint is None:
        made, fresh = ensure_reference_model(shape.name, quantization.name)
        where = f"{'made' if fresh else 'in'} {made.folder}"
        told = f"random weights in the shape of {shape.name}, {quantization.name} ({where})"
        return Checkpoint(place=str(made.folder), random_weights=True, told=told)
    folder = Path(expert.checkpoint).expanduser()
    if folder.is_dir():
        if not any((folder / config).is_file() for config in ("config.json", "params.json")):  # the latter: Mistral's
            raise ValueError(f"expert {name!r}: checkpoint {expert.checkpoint!r} is a folder without config.json")
        random = is_reference_model(folder)
        told = f"random weights, {folder} has none" if random else f"weights in {folder}"
        warnings = tuple(f"expert {name}: {line}" for line in _differences(folder, expert))
        return Checkpoint(place=str(folder), random_weights=random, told=told, warnings=warnings)
    if expert.checkpoint.startswith((".", "/", "~")):
        raise ValueError(f"expert {name!r}: checkpoint {expert.checkpoint!r} is no folder")
    return Checkpoint(
        place=expert.checkpoint, random_weights=False, told=f"weights of {expert.checkpoint} from the hub"
    )


def _differences(folder: Path, expert: ExpertSpec) -> list[str]:
    """In what a checkpoint's configuration differs from the model and quantization that the fleet file names."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{folder / 'config.json'} cannot be read: {error}"]
    shape, quantization = find_model(expert.model), find_quantization(expert.quantization).name
    wanted = model_config(shape, quantization)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    lines = [
        f"the checkpoint's {field} is {config[field]}, {shape.name} has {wanted[field]}"
        for field in fields
        if field in config and config[field] != wanted[field]
    ]
    stored = _stored_quantization(config)
    if stored is not None and stored != quantization:
        lines.append(f"the checkpoint is {stored}, the fleet file says {quantization}")
    return lines


def _stored_quantization(config: dict[str, Any]) -> str | None:
    """The catalogue's name of a checkpoint's format; None when it is another's."""
    stored = config.get("quantization_config")
    if not stored:
        return "bf16"
    method = str(stored.get("quant_method", ""))
    if method == "compressed-tensors":
        groups = list(stored.get("config_groups", {}).values())
        weights = groups[0].get("weights") or {} if groups else {}
        return {"8 int": "int8", "8 float": "fp8"}.get(f"{weights.get('num_bits')} {weights.get('type')}")
    return method if method in ("awq", "gptq", "fp8") else None
