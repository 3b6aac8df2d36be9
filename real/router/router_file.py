"""The file of a fitted classifier: a versioned ``.npz`` of plain arrays, which cannot carry code.

Members: ``format`` (1), ``kind`` (tfidf or embedding), ``class_names``, ``centres`` (a row per class), ``report`` (what
the fit was worth, JSON), and by kind ``vocabulary`` (UTF-8, a term a line) and ``table`` (a row per term), or ``model``
and ``probe``. The same arrays give the same bytes.
"""

import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from real.router.centres import Centres

FORMAT = 1
MAX_BYTES = 2**30
"""Unpacked; a zip of a few kilobytes can claim far more."""


@dataclass(frozen=True, slots=True)
class RouterFile:
    """What a classifier file holds: ``vocabulary`` and ``table`` if of kind tfidf, ``model`` and ``probe`` if not."""

    kind: str
    centres: Centres
    report: dict[str, Any] = field(default_factory=dict)
    vocabulary: tuple[str, ...] = ()
    table: NDArray[np.floating] | None = None
    model: str | None = None
    probe: NDArray[np.floating] | None = None


def write_router_file(content: RouterFile, path: Path) -> None:
    """Write a classifier file, numbers as float32.

    Raises:
        ValueError: it cannot be written there.
    """
    arrays: dict[str, Any] = {
        "format": np.int64(FORMAT),
        "kind": np.str_(content.kind),
        "class_names": np.array(content.centres.class_names),
        "centres": content.centres.vectors.astype(np.float32),
        "report": np.str_(json.dumps(content.report, sort_keys=True, allow_nan=False)),
    }
    if content.table is not None:
        arrays["vocabulary"] = np.frombuffer("\n".join(content.vocabulary).encode(), dtype=np.uint8)
        arrays["table"] = content.table.astype(np.float32)
    if content.probe is not None:
        arrays["model"] = np.str_(content.model or "")
        arrays["probe"] = content.probe.astype(np.float32)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    try:
        path.write_bytes(packed.getvalue())
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def read_router_file(path: Path) -> RouterFile:
    """Read a classifier file, trusting nothing in it.

    Raises:
        ValueError: there is no such file, or it is not a whole classifier file of this format; in one line.
    """
    try:
        return _content(_arrays(path), path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            unpacked = sum(member.file_size for member in packed.infolist())
        if unpacked > MAX_BYTES:
            raise ValueError(f"{path}: unpacks to {unpacked:,} bytes, more than the {MAX_BYTES:,} allowed")
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a classifier file, or only part of one ({error})") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            members = {name: arrays[name] for name in arrays.files}
    except (ValueError, KeyError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path}: holds pickled objects, which could run code: refused") from error
        raise ValueError(f"{path}: damaged ({error})") from error
    strange = [name for name, member in members.items() if not isinstance(member, np.ndarray)]
    if strange:
        raise ValueError(f"{path}: not a classifier file: {strange[0]!r} is not an array")
    return members


def _content(arrays: dict[str, NDArray[Any]], path: Path) -> RouterFile:
    version = _member(arrays, path, "format", "iu", 0)
    if version != FORMAT:
        raise ValueError(f"{path}: format {version}, expected {FORMAT}; fit it anew with expert-router router fit")
    kind = str(_member(arrays, path, "kind", "U", 0))
    class_names = tuple(map(str, _member(arrays, path, "class_names", "U", 1)))
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError(f"{path}: class_names must be names that differ, got {', '.join(class_names) or 'none'}")
    vectors = _member(arrays, path, "centres", "f", 2)
    if len(vectors) != len(class_names):
        raise ValueError(f"{path}: centres has {len(vectors)} rows for {len(class_names)} classes")
    centres = Centres(class_names, vectors)
    try:
        report = json.loads(str(_member(arrays, path, "report", "U", 0)))
        if not isinstance(report, dict):
            raise TypeError
    except (json.JSONDecodeError, TypeError, RecursionError):
        raise ValueError(f"{path}: report is not a JSON object") from None
    if kind == "tfidf":
        table = _member(arrays, path, "table", "f", 2)
        try:
            vocabulary = tuple(
                _member(arrays, path, "vocabulary", "u", 1).astype(np.uint8).tobytes().decode().split("\n")
            )
        except UnicodeDecodeError:
            raise ValueError(f"{path}: vocabulary is not UTF-8") from None
        if table.shape != (len(vocabulary), vectors.shape[1]):
            wanted = (len(vocabulary), vectors.shape[1])
            raise ValueError(f"{path}: table has shape {table.shape}, expected {wanted} by vocabulary and centres")
        return RouterFile(kind, centres, report, vocabulary=vocabulary, table=table)
    if kind == "embedding":
        probe = _member(arrays, path, "probe", "f", 1)
        if len(probe) != vectors.shape[1]:
            raise ValueError(f"{path}: probe has {len(probe)} numbers, centres have {vectors.shape[1]}")
        return RouterFile(kind, centres, report, model=str(_member(arrays, path, "model", "U", 0)), probe=probe)
    raise ValueError(f"{path}: kind {kind!r}, expected tfidf or embedding")


def _member(arrays: dict[str, NDArray[Any]], path: Path, name: str, kinds: str, dimensions: int) -> NDArray[Any]:
    if name not in arrays:
        raise ValueError(f"{path}: not a classifier file: {name} is missing")
    array = arrays[name]
    if array.dtype.kind not in kinds or array.ndim != dimensions:
        raise ValueError(f"{path}: {name} is {array.ndim}-dimensional {array.dtype}, which is not what belongs there")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} holds numbers that are not finite")
    return array
