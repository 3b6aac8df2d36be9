"""CSV tables of measurements, also gzipped; a mistake names file, line and column."""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from math import isfinite, nan
from pathlib import Path
from typing import IO, Any, cast


class TableError(ValueError):
    """A table of measurements that cannot be read; names file, line, column, value and what was expected."""


def table_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, column -> cell) of a CSV file with a header."""
    line = 0  # read well so far
    try:
        with _open(path) as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            missing = [name for name in required if name not in header]
            if missing:
                raise TableError(f"{path}: line 1: columns missing: {', '.join(missing)}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    last = header[min(len(cells), len(header)) - 1]
                    raise TableError(
                        f"{path}: line {reader.line_num}: column {last!r}: the row ends after {len(cells)} cells, "
                        f"expected {len(header)}; is the file truncated?"
                    )
                line = reader.line_num
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise TableError(f"{path}: line {reader.line_num}: {error}; is the file truncated?") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"after line {line}: the compressed file is broken: {error}; truncated?"
        raise TableError(f"{path}: {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise TableError(f"{path}: cannot be read: {reason}") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")


def number_cell(path: Path, line: int, row: Mapping[str, str], column: str, *, required: bool = False) -> float:
    """Return a cell that holds a number >= 0; NaN where it is empty.

    Raises:
        TableError: it holds anything else, or is empty and ``required``.
    """
    cell = row.get(column, "")
    if not cell:
        if required:
            raise cell_mistake(path, line, column, cell, "a number >= 0")
        return nan
    try:
        value = float(cell)
    except ValueError:
        value = nan
    if not (isfinite(value) and value >= 0):
        raise cell_mistake(path, line, column, cell, "a number >= 0")
    return value


def parsed_cell(path: Path, line: int, column: str, cell: str, parse: Callable[[str], Any]) -> Any:
    """Return what ``parse`` makes of a cell; its ValueError says what was expected.

    Raises:
        TableError: ``parse`` refuses it.
    """
    try:
        return parse(cell)
    except ValueError as error:
        raise cell_mistake(path, line, column, cell, str(error)) from None


def cell_mistake(path: Path, line: int, column: str, cell: str, expected: str) -> TableError:
    """Return the error for a cell that is not what its column holds."""
    return TableError(f"{path}: line {line}: column {column!r}: got {cell!r}, expected {expected}")
