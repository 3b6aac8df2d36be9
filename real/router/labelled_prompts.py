"""Files of prompts: one JSON object a line, ``{"text": ..., "class": ...}``, the class in all lines or in none."""

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from sim.mistakes import shown

PACKAGED = files("real.router") / "data" / "prompts.jsonl"
"""Written for this project; ``real/router/data/README.md`` says how."""


@dataclass(frozen=True, slots=True)
class LabelledPrompts:
    """Texts, and the class of each where the file says it."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None


def read_packaged_prompts() -> LabelledPrompts:
    """Return the prompts that come with the package."""
    with as_file(PACKAGED) as path:
        return read_prompts(path)


def read_prompts(path: Path) -> LabelledPrompts:
    """Read a file of prompts. Empty lines are skipped, and so are fields of other names.

    Raises:
        ValueError: it cannot be read, or a line is wrong; names file, line and field.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    texts, labels, unlabelled = [], [], None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, label = _prompt(line, f"{path}, line {number}")
        texts.append(text)
        if label is None:
            unlabelled = unlabelled or number
        else:
            labels.append(label)
    if not texts:
        raise ValueError(f"{path}: holds no prompts, expected one JSON object a line with the field text")
    if labels and unlabelled:
        raise ValueError(f"{path}, line {unlabelled}: class is missing, though other lines have one; give all or none")
    return LabelledPrompts(tuple(texts), tuple(labels) or None)


def _prompt(line: str, place: str) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{place}: expected an object such as {{"text": "..."}}, got {shown(row)}')
    for name in ("text", "class"):
        value = row.get(name)
        if value is None and name == "class":
            continue
        if name not in row:
            raise ValueError(f"{place}: {name} is missing")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: {name} must be text that is not empty, got {shown(value)}")
    return row["text"], row.get("class")
