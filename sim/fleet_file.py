"""Reading a fleet file: YAML text to a checked ``FleetFile``, with one plain line for every mistake.

On top of plain YAML a file may use top-level ``x-`` keys (ignored: a place for anchors), ``<<`` merges, and
``extends: other`` in a fleet, which takes every field of the other fleet and lays the own ones over it, mapping by
mapping; ``null`` removes what was inherited. Overrides (``--set path=value``) apply before ``extends``, as if the file
had been edited.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, PrivateAttr, ValidationError

from sim.mistakes import (
    FleetFileError,
    Mistakes,
    add_validation_error,
    did_you_mean,
    mistake,
    names_things,
    shown,
    step,
)
from sim.serve_spec import EmbeddingClassifier, TfidfClassifier
from sim.spec import Empirical, ExpertSpec, FleetFile, Trace
from sim.yaml_tree import NOWHERE, SET, Node, Path, Place, YamlError, read_yaml

__all__ = ["FleetFileError", "LoadedFleetFile", "fleet_file_schema", "load_fleet", "parse_fleet"]

Overrides = Mapping[str, str] | Sequence[str]


class LoadedFleetFile(FleetFile):
    """A fleet file that knows where each of its values was written. Paths to files in it are absolute."""

    _places: dict[Path, Place] = PrivateAttr(default_factory=dict)

    def where(self, path: Path) -> Place:
        """Where a value was written, e.g. on ``"line 12"``; its nearest ancestor's place when it was left out."""
        return _nearest(self._places, path)


def load_fleet(path: str | FilePath, overrides: Overrides = ()) -> LoadedFleetFile:
    """Read and check a fleet file.

    Args:
        path: the YAML file. Files named in it are looked for beside it.
        overrides: ``"fleets.a.experts.code.replicas=4"`` strings, or a mapping of path to YAML text.

    Raises:
        FleetFileError: with every mistake found, one line each.
    """
    path = FilePath(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FleetFileError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise FleetFileError([f"{path}: is a directory, expected a fleet file (YAML)"]) from None
    except UnicodeDecodeError as error:
        raise FleetFileError([f"{path}: not a text file (byte {error.start} is not UTF-8)"]) from None
    except OSError as error:
        raise FleetFileError([f"{path}: cannot be read: {error.strerror}"]) from None
    return parse_fleet(text, overrides, directory=path.parent, name=str(path))


def parse_fleet(
    text: str, overrides: Overrides = (), directory: str | FilePath = ".", name: str = ""
) -> LoadedFleetFile:
    """Check the text of a fleet file, as ``load_fleet`` does.

    Args:
        text: YAML.
        overrides: as for ``load_fleet``.
        directory: where files named in the text are looked for.
        name: of the file that the text is from, told when it is no YAML.

    Raises:
        FleetFileError: with every mistake found, one line each.
    """
    try:
        root = read_yaml(text)
    except YamlError as error:
        raise FleetFileError([f"{name}: {error}" if name else str(error)]) from None
    if root.value is None:
        raise FleetFileError(["the fleet file is empty, expected at least 'workload' and 'fleets'"])
    if not isinstance(root.value, dict):
        raise FleetFileError([f"expected a mapping with 'workload' and 'fleets', got {shown(root.plain())} (line 1)"])
    root.value = {key: child for key, child in root.value.items() if not key.startswith("x-")}
    for override in _pairs(overrides):
        _set(root, *override)
    _extend(root)
    data, places = root.plain(), dict(root.locations())
    places[()] = NOWHERE  # "line 1" says nothing about a top-level field left out
    mistakes = Mistakes(lambda path: _nearest(places, path))
    try:
        file = LoadedFleetFile.model_validate(data)
    except ValidationError as error:
        add_validation_error(mistakes, error, FleetFile, data)
        raise FleetFileError(mistakes.lines()) from None
    resolved: LoadedFleetFile = _with_absolute_paths(file, (), FilePath(directory).resolve(), mistakes)
    mistakes.raise_if_any()
    resolved._places = places
    return resolved


def _nearest(places: Mapping[Path, Place], path: Path) -> Place:
    while path not in places and path:
        path = path[:-1]
    return places.get(path, NOWHERE)


# --------------------------------------------------------------------------------------------------------- overrides


def _pairs(overrides: Overrides) -> list[tuple[str, str]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    if isinstance(overrides, str):
        raise TypeError("overrides must be a list of 'path=value' strings or a mapping, got one string")
    wrong = [text for text in overrides if "=" not in text or text.startswith("=")]
    if wrong:
        raise FleetFileError([f"--set {shown(text)}: expected PATH=VALUE, e.g. run.seed=7" for text in wrong])
    return [(text.partition("=")[0].strip(), text.partition("=")[2]) for text in overrides]


def _set(root: Node, dotted: str, text: str) -> None:
    """Apply one override to the tree, as if the file had been edited."""
    try:
        new = read_yaml(text, where=SET)
    except YamlError as error:
        raise FleetFileError([f"{dotted}: {error} (--set)"]) from None
    view = copy.deepcopy(root)
    _extend(view)
    path = _find_path(view, dotted)
    node = root
    for depth, key in enumerate(path[:-1], start=1):
        below = node.child(key)
        if below is None or below.value is None:  # left out, or inherited; a list is then copied to be edited
            inherited = _at(view, path[:depth])
            below = inherited if inherited and isinstance(inherited.value, list) else Node({}, SET)
            _put(node, key, below)
        node = below
    _put(node, path[-1], new)


def _find_path(view: Node, dotted: str) -> Path:
    """The path that ``a.b.0.c`` means in this file: names may contain dots, list entries are numbers from 0."""
    parts = re.sub(r"\[(\d+)\]", r".\1", dotted).split(".")
    node: Node | None = view
    expected: Any = FleetFile
    path: Path = ()
    while parts:
        key: str | int
        if node is not None and isinstance(node.value, list):
            key, parts = parts[0], parts[1:]
            if not key.isdecimal() or int(key) >= len(node.value):
                problem = f"has entries 0 to {len(node.value) - 1}, got {shown(key)}"
                raise FleetFileError([mistake(path, problem, SET)])
            key = int(key)
        elif node is None or node.value is None or isinstance(node.value, dict):
            known = list(node.value) if node is not None and isinstance(node.value, dict) else []
            length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), 1)
            key, parts = ".".join(parts[:length]), parts[length:]
            if parts and key not in known and names_things(expected):
                raise FleetFileError([mistake((*path, key), "not in this file", SET, did_you_mean(key, known))])
        else:
            problem = f"has no fields to set, it is {shown(node.value)}"
            raise FleetFileError([mistake(path, problem, SET, ", set the whole of it")])
        node = node.child(key) if node is not None else None
        expected = step(expected, key)
        path = (*path, key)
    return path


def _at(node: Node | None, path: Path) -> Node | None:
    for key in path:
        node = node.child(key) if node is not None else None
    return node


def _put(node: Node, key: str | int, new: Node) -> None:
    if isinstance(node.value, list) and isinstance(key, int):
        node.value[key] = new
    elif isinstance(node.value, dict):
        node.value[str(key)] = new


# ----------------------------------------------------------------------------------------------------------- extends


def _extend(root: Node) -> None:
    """Replace each fleet that extends another by the other with its own fields laid over it."""
    fleets = root.child("fleets")
    if fleets is None or not isinstance(fleets.value, dict):
        return
    done: dict[str, Node] = {}
    mistakes: list[str] = []
    for name in fleets.value:
        try:
            _extended(name, fleets.value, (), done)
        except FleetFileError as error:
            mistakes += error.mistakes
    if mistakes:
        raise FleetFileError(list(dict.fromkeys(mistakes)))
    fleets.value = {name: done[name] for name in fleets.value}


def _extended(name: str, fleets: dict[str, Node], chain: tuple[str, ...], done: dict[str, Node]) -> Node:
    """The fleet of this name with what it extends; ``chain`` names the fleets that led here."""
    if name in done:
        return done[name]
    fleet = fleets[name]
    base = fleet.child("extends")
    if not isinstance(fleet.value, dict) or base is None or base.value is None:
        return done.setdefault(name, fleet)
    path = ("fleets", name, "extends")
    if not isinstance(base.value, str):
        raise FleetFileError([mistake(path, f"expected the name of a fleet, got {shown(base.plain())}", base.where)])
    if base.value not in fleets:
        hint = did_you_mean(base.value, [other for other in fleets if other != name])
        raise FleetFileError([mistake(path, f"unknown fleet {base.value!r}", base.where, hint)])
    chain = (*chain, name)
    if base.value in chain:
        circle = chain[chain.index(base.value) :]
        start = circle.index(min(circle))  # so that every fleet of the circle gives the same line
        circle = (*circle[start:], *circle[: start + 1])
        place = fleets[circle[0]].where
        raise FleetFileError([mistake(("fleets", circle[0]), f"extends in a circle: {' -> '.join(circle)}", place)])
    inherited = _extended(base.value, fleets, chain, done)
    own = Node({key: child for key, child in fleet.value.items() if key != "extends"}, fleet.where)
    return done.setdefault(name, _laid_over(inherited, own))


def _laid_over(base: Node, own: Node) -> Node:
    """``own`` over ``base``: mappings entry by entry, everything else replaced; ``null`` removes an entry."""
    if not isinstance(base.value, dict) or not isinstance(own.value, dict):
        return own
    entries = dict(base.value)
    for key, child in own.value.items():
        if child.value is None:
            entries.pop(key, None)
        else:
            entries[key] = _laid_over(entries[key], child) if key in entries else child
    return Node(entries, own.where)


# ------------------------------------------------------------------------------------------------------- named files


def _with_absolute_paths(value: Any, path: Path, directory: FilePath, mistakes: Mistakes) -> Any:
    """The value with every file named in it made absolute; files that do not exist are mistakes."""
    if isinstance(value, dict):
        return {key: _with_absolute_paths(item, (*path, key), directory, mistakes) for key, item in value.items()}
    if not isinstance(value, BaseModel):
        return value
    update = {
        name: _with_absolute_paths(item, (*path, name), directory, mistakes)
        for name, item in value
        if isinstance(item, dict | BaseModel)
    }
    if isinstance(value, Trace | Empirical):
        update["file"] = _absolute(value.file, (*path, "file"), directory, mistakes)
    if isinstance(value, TfidfClassifier | EmbeddingClassifier) and value.file is not None:
        update["file"] = _absolute(value.file, (*path, "file"), directory, mistakes)
    if isinstance(value, ExpertSpec) and value.profile is not None and is_profile_file(value.profile):
        update["profile"] = _absolute(value.profile, (*path, "profile"), directory, mistakes)
    if isinstance(value, ExpertSpec) and value.checkpoint is not None:
        folder = directory / FilePath(value.checkpoint).expanduser()
        if folder.is_dir():  # or else a name on a hub, or a folder of the machine that will serve
            update["checkpoint"] = str(folder)
    return value.model_copy(update=update)


def is_profile_file(profile: str) -> bool:
    """Whether an expert's profile is a file rather than the name of a packaged profile."""
    return profile.endswith(".json") or "/" in profile or "\\" in profile


def _absolute(file: str, path: Path, directory: FilePath, mistakes: Mistakes) -> str:
    absolute = directory / FilePath(file).expanduser()
    if not absolute.is_file():
        mistakes.add(path, f"no such file {str(absolute)!r}")
    return str(absolute)


# ------------------------------------------------------------------------------------------------------- JSON Schema


def fleet_file_schema() -> dict[str, Any]:
    """The JSON Schema of fleet files, for editors that complete and check while one types."""
    schema = FleetFile.model_json_schema(mode="validation")
    schema["title"] = "Expert Router fleet file"
    schema["patternProperties"] = {"^x-": {}}
    definitions = schema["$defs"]
    partial = {name: _partial(definitions[name]) for name in _FLEET_DEFINITIONS}
    definitions |= {f"Partial{name}": definition for name, definition in partial.items()}
    whole = definitions["FleetSpec"]
    definitions["FleetSpec"] = {
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/PartialFleetSpec"},
        "else": whole,
        "title": "FleetSpec",
    }
    return schema


_FLEET_DEFINITIONS = ("FleetSpec", "RouterSpec", "ExpertSpec", "EngineSpec", "FrontEndSpec")


def _partial(definition: dict[str, Any]) -> dict[str, Any]:
    """A definition with nothing required and everything nullable, as a fleet that extends another is written."""
    text = json.dumps({key: value for key, value in definition.items() if key != "required"})
    for name in _FLEET_DEFINITIONS:
        text = text.replace(f'"#/$defs/{name}"', f'"#/$defs/Partial{name}"')
    partial: dict[str, Any] = json.loads(text)
    partial["title"] = f"Partial{definition['title']}"
    partial["properties"] = {
        name: {"anyOf": [field, {"type": "null"}]} for name, field in partial["properties"].items()
    }
    return partial


if __name__ == "__main__":
    print(json.dumps(fleet_file_schema(), indent=2))
