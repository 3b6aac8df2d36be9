"""Numbers of one process in a file that another can read at any time: adding to one is a store to shared memory.

Nothing is flushed, so nothing is lost when the process is killed. A figure is a row of doubles in ``PATH.values``; a
line of JSON in ``PATH.names``, written after its row has been made, says what it is and where it begins.
"""

import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PAGE_BYTES: Final = 4096
_VALUE_BYTES: Final = 8
_PAGE_VALUES: Final = _PAGE_BYTES // _VALUE_BYTES


@dataclass(frozen=True, slots=True)
class Figure:
    """What one row of numbers is."""

    name: str
    labels: tuple[str, ...]


class FiguresFile:
    """The figures of this process."""

    def __init__(self, path: Path) -> None:
        """Make the two files."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._values = os.open(path.with_suffix(".values"), flags, 0o600)
        self._names = os.open(path.with_suffix(".names"), flags | os.O_APPEND, 0o600)
        self._pages = 0
        self._page: memoryview[float] = memoryview(bytes(_PAGE_BYTES)).cast("d")
        self._used = _PAGE_VALUES

    def row(self, name: str, labels: tuple[str, ...] = (), count: int = 1) -> "memoryview[float]":
        """Return a new row of zeros to write to; it must not be longer than a page."""
        if self._used + count > _PAGE_VALUES:
            at = self._pages * _PAGE_BYTES
            self._pages += 1
            os.ftruncate(self._values, self._pages * _PAGE_BYTES)
            self._page = memoryview(mmap.mmap(self._values, _PAGE_BYTES, offset=at)).cast("d")
            self._used = 0
        begin, self._used = self._used, self._used + count
        line = {"at": (self._pages - 1) * _PAGE_VALUES + begin, "count": count, "name": name, "labels": labels}
        os.write(self._names, json.dumps(line).encode() + b"\n")
        return self._page[begin : begin + count]


def read_figures(path: Path) -> dict[Figure, list[float]]:
    """Return the figures of a process, whether it lives or not."""
    lines = path.with_suffix(".names").read_bytes().splitlines(keepends=True)
    values = path.with_suffix(".values").read_bytes()
    figures = {}
    for line in lines:
        if line.endswith(b"\n"):  # the last may just be being written
            row = json.loads(line)
            numbers = struct.unpack_from(f"={row['count']}d", values, row["at"] * _VALUE_BYTES)
            figures[Figure(row["name"], tuple(row["labels"]))] = list(numbers)
    return figures
