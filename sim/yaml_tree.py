"""YAML text as a tree of values that know the line they were written on.

Scalars follow the YAML 1.2 core schema: ``1e-3`` is a number, ``on`` and ``no`` are words, ``010`` is ten and ``1:30``
is text. ``true`` and ``false`` stay words too: pydantic reads them where a field is boolean and refuses them where a
number belongs (it would take a real ``True`` as 1). Keys are text. ``<<`` merges work; duplicate keys, tags, and
anchors that contain themselves are errors.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import yaml

MAX_VALUES = 200_000  # a few nested aliases can expand to billions

_STANDARD = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema, less its booleans."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[object]]] = {}  # type: ignore[misc]  # PyYAML shares it by class


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(_STANDARD + tag, re.compile(pattern), list(first) if first else [""])


# An int of more than 401 digits stays text, because Python refuses to convert very long ones.
_resolve("int", r"^[-+]?[0-9][0-9_]{0,400}$", "-+0123456789")
_resolve("float", r"^[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$", "-+.0123456789")
_resolve("float", r"^([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", "-+.")
_resolve("null", r"^(~|null|Null|NULL)$", "~nN")
_resolve("null", r"^$", "")
_resolve("merge", r"^<<$", "<")

Path = tuple[str | int, ...]


class YamlError(ValueError):
    """Text that is not the YAML we read; the message is one line."""


class Place(NamedTuple):
    """Where a value was written: ``"line 12"`` for people, and the offset in the text (-1: not in the file)."""

    text: str
    offset: int = -1


NOWHERE = Place("")
SET = Place("--set")


@dataclass(slots=True)
class Node:
    """A value and where it was written; with an alias or a merge, where the anchor has it."""

    value: "dict[str, Node] | list[Node] | str | int | float | None"
    where: Place

    def plain(self) -> Any:
        """The value alone, as ordinary dictionaries, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> "Node | None":
        """The entry under this key or index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def locations(self, prefix: Path = ()) -> Iterator[tuple[Path, Place]]:
        """Path and ``where`` of this node and of everything in it."""
        yield prefix, self.where
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.locations((*prefix, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.locations((*prefix, index))


def read_yaml(text: str, where: Place | None = None) -> Node:
    """Parse one YAML document.

    Args:
        text: the document.
        where: what to give as every node's place instead of its line.

    Raises:
        YamlError: on a syntax error, with line and column, and on everything named in the module's docstring.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return Node(None, where or Place("line 1", 0))
        return _Reader(where).node(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and where is None else ""
        words = " ".join(part for part in (error.problem, error.context) if part)
        raise YamlError(f"not valid YAML: {place}{' '.join(words.split())}{_hint(text, error)}") from None
    except yaml.reader.ReaderError as error:
        raise YamlError(f"not valid YAML: character {error.position}: {error.reason}") from None
    except RecursionError:
        raise YamlError("not readable: nested too deeply") from None


def _hint(text: str, error: yaml.MarkedYAMLError) -> str:
    """What usually causes this syntax error."""
    mark = error.problem_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or (mark and line[mark.column : mark.column + 1] == "\t"):
        return " (indent with spaces, not tabs)"
    if "mapping values are not allowed" in (error.problem or ""):
        return " (put text that contains ': ' in quotes)"
    return ""


class _Reader:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, where: Place | None) -> None:
        self._where = where
        self._values = 0
        self._open: set[int] = set()  # ids of the collections we are inside of

    def node(self, source: yaml.Node, key: yaml.Node | None = None) -> Node:
        """Convert a node; its place is the line of its key when it has one."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise YamlError(f"not readable: its aliases expand to more than {MAX_VALUES:,} values")
        where = self._place(key or source)
        if isinstance(source, yaml.ScalarNode):
            return Node(self._scalar(source), where)
        if id(source) in self._open:
            self._fail(source, "an anchor that contains itself")
        self._open.add(id(source))
        node = Node(self._mapping(source) if isinstance(source, yaml.MappingNode) else self._sequence(source), where)
        self._open.remove(id(source))
        return node

    def _place(self, source: yaml.Node) -> Place:
        return self._where or Place(f"line {source.start_mark.line + 1}", source.start_mark.index)

    def _fail(self, source: yaml.Node, what: str) -> NoReturn:
        raise YamlError(f"{what} ({self._place(source).text})")

    def _sequence(self, source: yaml.Node) -> list[Node]:
        if source.tag != f"{_STANDARD}seq":
            self._fail(source, f"tag {source.tag!r} is not supported")
        return [self.node(item) for item in source.value]

    def _mapping(self, source: yaml.MappingNode) -> dict[str, Node]:
        if source.tag != f"{_STANDARD}map":
            self._fail(source, f"tag {source.tag!r} is not supported")
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in source.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fail(key, "a key must be a single word or text, not a mapping or a list")
            if key.tag == f"{_STANDARD}merge":
                for name, entry in self._merge(value).items():
                    merged.setdefault(name, entry)
            elif key.value in own:
                self._fail(key, f"duplicate key {key.value!r}, first given on {own[key.value].where.text}")
            else:
                own[key.value] = self.node(value, key)
        return own | {name: entry for name, entry in merged.items() if name not in own}

    def _merge(self, source: yaml.Node) -> dict[str, Node]:
        """What ``<<: *anchor`` or ``<<: [*first, *second]`` brings in; the first given wins."""
        sources = source.value if isinstance(source, yaml.SequenceNode) else [source]
        entries: dict[str, Node] = {}
        for item in sources:
            value = self.node(item).value if isinstance(item, yaml.MappingNode) else None
            if value is None or not isinstance(value, dict):
                self._fail(item, "'<<' needs a mapping, or a list of mappings")
            entries = value | entries
        return entries

    def _scalar(self, source: yaml.ScalarNode) -> str | int | float | None:
        text: str = source.value
        kind = source.tag.removeprefix(_STANDARD)
        try:
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            self._fail(source, f"{text!r} is not a number")
        if kind == "null":
            return None
        if kind not in ("str", "merge"):
            self._fail(source, f"tag {source.tag!r} is not supported")
        return text
