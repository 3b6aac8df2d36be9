"""Classifier files: the same bytes from the same fit, and nothing in a file is trusted."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from real.router.classifier_fit import RouterFit
from real.router.router_file import read_router_file, write_router_file
from tests.classifiers import fit_of_half, halves, labels


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "router.npz"
    write_router_file(fit_of_half().router_file({"prompts": 255}), path)
    return path


def change(path: Path, **members: Any) -> None:
    """Replace members of a file; None takes one out."""
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays.files} | members
    np.savez(path, **{name: value for name, value in kept.items() if value is not None})


def test_what_is_written_is_read(path: Path) -> None:
    content, fit = read_router_file(path), fit_of_half()
    assert content.kind == "tfidf"
    assert content.report == {"prompts": 255}
    assert content.centres.class_names == fit.centres_.class_names
    assert content.vocabulary == fit.classifier().vocabulary
    assert content.table is not None
    np.testing.assert_array_equal(content.table, fit.classifier().table)


def test_the_same_fit_writes_the_same_bytes(path: Path, tmp_path: Path) -> None:
    again = RouterFit(centres="labels").fit(halves()[0], labels()[::2])
    write_router_file(again.router_file({"prompts": 255}), tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_pickled_objects_are_refused_unread(path: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    change(path, class_names=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match=r"router\.npz: holds pickled objects, which could run code: refused"):
        read_router_file(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"router\.npz: not a classifier file"):
        read_router_file(path)
    assert not (tmp_path / "exploded").exists()


def test_another_version_is_refused(path: Path) -> None:
    change(path, format=np.int64(2))
    with pytest.raises(ValueError, match=r"router\.npz: format 2, expected 1; fit it anew"):
        read_router_file(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"\x93NUMPY\x01\x00v\x00{'descr': '<i8'}"])
def test_something_else_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"router\.npz: not a classifier file"):
        read_router_file(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.npz: cannot be read: No such file"):
        read_router_file(tmp_path / "none.npz")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    whole = path.read_bytes()
    part = path.with_name("part.npz")
    part.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"part\.npz: "):
        read_router_file(part)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_damaged_byte_gives_one_line_or_no_harm(path: Path, at: float, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= bits
    damaged = path.with_name("damaged.npz")
    damaged.write_bytes(data)
    try:
        read_router_file(damaged)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017  # either is right


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"table": None}, "not a classifier file: table is missing"),
        ({"kind": np.str_("magic")}, "kind 'magic', expected tfidf or embedding"),
        ({"class_names": np.array(["a", "a"])}, "class_names must be names that differ, got a, a"),
        ({"class_names": np.array(["a", "b"])}, "centres has 7 rows for 2 classes"),
        ({"centres": np.ones(7)}, "centres is 1-dimensional float64, which is not what belongs there"),
        ({"centres": np.full((7, 100), np.nan)}, "centres holds numbers that are not finite"),
        ({"table": np.ones((3, 100))}, r"table has shape \(3, 100\), expected \(\d+, 100\)"),
        ({"vocabulary": np.array([255], dtype=np.uint8)}, "vocabulary is not UTF-8"),
        ({"report": np.str_("[1]")}, "report is not a JSON object"),
        ({"report": np.str_("{")}, "report is not a JSON object"),
    ],
)
def test_members_that_do_not_fit_are_told(path: Path, members: dict[str, Any], message: str) -> None:
    change(path, **members)
    with pytest.raises(ValueError, match=rf"router\.npz: {message}"):
        read_router_file(path)


def test_a_zip_of_other_things_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("format", "1")
    with pytest.raises(ValueError, match=r"router\.npz: not a classifier file: 'format' is not an array"):
        read_router_file(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("real.router.router_file.MAX_BYTES", 10**7)
    change(path, bomb=np.zeros(10**7, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"router\.npz: unpacks to 1[\d,]+ bytes, more than the 10,000,000 allowed"):
        read_router_file(path)
