"""What is wrong with a fleet file, in the file's own words: one line a mistake.

pydantic reports every branch of a union it tried and puts the union's tags into its paths. Here each error is followed
down the models beside the user's data, so that a line names the path the user wrote and one reason.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sim.spec import Fixed
from sim.yaml_tree import NOWHERE, Path, Place

_MAX_LISTED = 12


class FleetFileError(ValueError):
    """A fleet file that cannot be used: ``mistakes`` holds one line each, ``str`` is those lines."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.mistakes))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest known word, or else the known words; starts with a comma."""
    known = list(known)
    lowered = {name.lower(): name for name in reversed(known)}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if near:
        return f", did you mean {lowered[near[0]]!r}?"
    listed = ", ".join(known[:_MAX_LISTED]) + (", ..." if len(known) > _MAX_LISTED else "")
    return f", known: {listed or 'none'}"


def path_text(path: Path) -> str:
    """``fleets.a.experts.code`` and ``users[2]``, as ``--set`` takes them."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = part if part and part.isprintable() else repr(part)
            text += f".{word}" if text else word
    return text


def shown(value: Any) -> str:
    """A value as a message quotes it, on one short line."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def mistake(path: Path, problem: str, where: Place = NOWHERE, hint: str = "") -> str:
    """One line: path, problem, place, hint."""
    place = f" ({where.text})" if where.text else ""
    head = f"{path_text(path)}: " if path else ""
    return f"{head}{problem}{place}{hint}"


class Mistakes:
    """Collects mistakes and tells each once, however many fleets inherit it."""

    def __init__(self, where: Callable[[Path], Place]) -> None:
        """``where`` gives the place of a path, or of its nearest ancestor."""
        self._where = where
        self._lines: dict[object, str] = {}

    def add(self, path: Path, problem: str, hint: str = "") -> None:
        """Note a mistake, unless the same text in the file has already given rise to it under another path."""
        place = self._where(path)
        where = path if place.offset < 0 else (place, path[-1:])
        self._lines.setdefault((where, problem, hint), mistake(path, problem, place, hint))

    def lines(self) -> list[str]:
        """The lines so far, in order."""
        return list(self._lines.values())

    def raise_if_any(self) -> None:
        """Raise ``FleetFileError`` with all of them, if there are any."""
        if self._lines:
            raise FleetFileError(self.lines())


# ------------------------------------------------------------------------------------------------ walking the models


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where an error sits: the user's path, the type expected there, the model around it, and the user's value."""

    path: Path
    expected: Any
    model: type[BaseModel] | None
    value: Any


def step(annotation: Any, key: str | int) -> Any:
    """The type under this key of a value of this type, or None where there is none."""
    annotation = _bare(annotation)
    if _is_model(annotation):
        field = annotation.model_fields.get(str(key))
        return _bare(field.annotation) if field else None
    if get_origin(annotation) in (dict, list):
        return _bare(get_args(annotation)[-1])
    below = (step(member, key) for member in _members(annotation))
    return next((found for found in below if found is not None), None)


def names_things(annotation: Any) -> bool:
    """Whether the keys of a value of this type are names that the user gave to fleets, experts or classes."""
    return get_origin(annotation) is dict and _is_model(_bare(get_args(annotation)[1]))


def _bare(annotation: Any) -> Any:
    """Without ``Annotated`` and without ``None``."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        return Union[tuple(members)] if len(members) > 1 else _bare(members[0])  # noqa: UP007  # built at run time
    return annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    """Members of a union of several types, else nothing."""
    return tuple(map(_bare, get_args(annotation))) if get_origin(annotation) in (Union, UnionType) else ()


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tag_field(members: Sequence[Any]) -> str | None:
    """The field that tells the members of a union apart, or None when their shapes do."""
    if not all(map(_is_model, members)):
        return None
    fields: dict[str, FieldInfo] = members[0].model_fields
    return next(name for name, field in fields.items() if get_origin(field.annotation) is Literal)


def _tag(model: type[BaseModel], field: str) -> str:
    return str(get_args(model.model_fields[field].annotation)[0])


def _branch(members: Sequence[Any], value: Any) -> tuple[Any, str]:
    """The member of an undiscriminated union that a value of this shape was meant for, and pydantic's tag for it."""
    for member in members:
        if isinstance(value, dict) and _is_model(member):
            return member, member.__name__
        if isinstance(value, list) and get_origin(member) is list:
            return member, "list["
        if member in (int, float) and not isinstance(value, dict | list):
            return member, "constrained-"
    return None, ""


def _spot(root: type[BaseModel], location: Sequence[str | int], data: Any) -> _Spot | None:
    """Follow a pydantic error location down the models and the data; None for a union branch that was not meant."""
    expected: Any = root
    model: type[BaseModel] | None = None
    path: Path = ()
    for item in location:
        members = _members(expected)
        tag_field = _tag_field(members) if members else None
        if tag_field:
            expected = next(member for member in members if _tag(member, tag_field) == item)
        elif members:
            member, tag = _branch(members, data)
            if member is not None and not str(item).startswith(tag):
                return None
            if member in (None, int, float):
                break
            expected = member
        elif _is_model(expected) and not isinstance(data, dict):
            break  # a number that stands for a mapping
        else:
            model = expected if _is_model(expected) else None
            expected = step(expected, item)
            path = (*path, item)
            data = _get(data, item)
    return _Spot(path, expected, model, data)


def _get(value: Any, key: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(key)
    return value[key] if isinstance(value, list) and isinstance(key, int) and key < len(value) else None


# -------------------------------------------------------------------------------------------------- saying what it is


def kind_of(annotation: Any) -> str:
    """What a type takes, in words."""
    annotation = _bare(annotation)
    names: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    members = _members(annotation)
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is list:
        item = kind_of(get_args(annotation)[0]).removeprefix("a ")
        return f"a list of {item if item == 'text' else item + 's'}"
    if _is_model(annotation):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    if members and (tag_field := _tag_field(members)):
        tags = ", ".join(_tag(member, tag_field) for member in members)
        return f"{'a number or ' if Fixed in members else ''}a mapping with {tag_field!r} ({tags})"
    kinds = [kind_of(member) for member in members] or ["a mapping"]
    return " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))


_BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}


def _add(mistakes: Mistakes, error: ErrorDetails, at: _Spot) -> None:
    """Note one pydantic error in plain words."""
    kind, context, path = error["type"], error.get("ctx", {}), at.path
    got = f"got {shown(at.value)}"
    if kind == "extra_forbidden":
        mistakes.add(path, "unknown field", did_you_mean(str(path[-1]), at.model.model_fields if at.model else ()))
    elif kind == "missing":
        mistakes.add(path, "missing", f", expected {kind_of(at.expected)}")
    elif kind == "union_tag_not_found" or kind == "union_tag_invalid":
        tag_field = context["discriminator"].strip("'")
        allowed = [_tag(member, tag_field) for member in _members(at.expected)]
        tag = _get(at.value, tag_field)
        path = (*path, tag_field)
        if tag is None:
            mistakes.add(path, "missing", f", expected one of {', '.join(allowed)}")
        else:
            mistakes.add(path, f"unknown value {shown(tag)}", did_you_mean(str(tag), allowed))
    elif kind == "literal_error":
        allowed = [str(value) for value in get_args(at.expected)]
        mistakes.add(path, f"unknown value {shown(at.value)}", did_you_mean(str(at.value), allowed))
    elif kind in _BOUNDS:
        bound = next(iter(context.values()))
        mistakes.add(path, f"must be {_BOUNDS[kind]} {bound:g}, {got}")
    elif kind == "too_short":
        mistakes.add(path, "is empty, needs at least one entry")
    elif kind == "finite_number":
        mistakes.add(path, f"must be a finite number, {got}")
    elif kind == "value_error":
        mistakes.add(path, str(context["error"]))
    elif kind == "string_type" and isinstance(at.value, int | float):
        mistakes.add(path, f"expected text, got the number {shown(at.value)}", ", put it in quotes")
    else:
        mistakes.add(path, f"expected {kind_of(at.expected)}, {got}")


def add_validation_error(mistakes: Mistakes, error: ValidationError, root: type[BaseModel], data: Any) -> None:
    """Note everything pydantic found, in the order of the models' fields.

    Args:
        mistakes: where to note it.
        error: what validating ``data`` as ``root`` raised.
        root: the model.
        data: the plain data as the user wrote it.
    """
    for details in error.errors(include_url=False):
        at = _spot(root, details["loc"], data)
        if at is not None:
            _add(mistakes, details, at)
