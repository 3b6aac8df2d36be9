"""Records on disk are whole after every point, are continued, and are never mixed with another engine's."""

import errno
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from calibrate.measure.files import MeasuredPoint, MeasurementError, MeasurementFolder, Meta
from calibrate.measure.grid import Point
from calibrate.measure.iteration_records import reconstruct, sent_frame
from sim.profile import ExpertIdentity
from sim.spec import EngineSpec
from tests.iteration_runs import SETTINGS, requests_of, run_engine

POINT = Point(kind="steps", requests=2, prompt_tokens=16, output_tokens=8)


def meta(**changes: Any) -> Meta:
    return Meta(
        **{
            "expert": ExpertIdentity(
                model="laptop-37m",
                quantization="bf16",
                gpu="CPU",
                tensor_parallel_size=1,
                engine=EngineSpec(),
                engine_version="vLLM 0.32.0",
            ),
            "settings": {"max_num_seqs": 32},
            "num_gpu_blocks": 100,
            "device": "a machine",
            "cores": [0],
            "command": ["measure"],
            "engine_command": ["vllm"],
            "program_version": "0",
            "date": "2026-11-25",
            "lengths": {},
            **changes,
        }
    )


def add_point(folder: MeasurementFolder, label: str, took_s: float = 2.0) -> None:
    lines, seen = run_engine(requests_of(POINT, label))
    point = MeasuredPoint(
        label=label,
        started_s=0,
        took_s=took_s,
        requests=2,
        prompt_tokens=32,
        output_tokens=16,
        iterations=len(lines),
        matched=1,
    )
    folder.add(point, reconstruct(lines, seen, SETTINGS, label), sent_frame(seen))


def begun(folder: Path) -> MeasurementFolder:
    measured = MeasurementFolder(folder)
    measured.begin(meta())
    return measured


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    measured = begun(tmp_path / "expert")
    add_point(measured, "a#1")
    add_point(measured, "b#1", took_s=3.0)
    again = MeasurementFolder.existing(tmp_path / "expert")
    assert again.meta == measured.meta
    assert again.meta is not None
    assert again.meta.measured_s == 5.0
    assert again.meta.complete_minutes == 0
    pd.testing.assert_frame_equal(again.iterations, measured.iterations)
    pd.testing.assert_frame_equal(again.requests, measured.requests)


def test_rows_of_a_point_that_was_not_finished_are_dropped(tmp_path: Path) -> None:
    measured = begun(tmp_path)
    add_point(measured, "a#1")
    before = (tmp_path / "meta.json").read_text()
    add_point(measured, "b#1")
    (tmp_path / "meta.json").write_text(before)  # as if it had been stopped between two files
    again = MeasurementFolder.existing(tmp_path)
    assert set(again.iterations["point"]) == set(again.requests["point"]) == {"a#1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"expert": meta().expert.model_copy(update={"engine_version": "vLLM 0.33.0"})},
            r"another expert \(engine_version vLLM 0\.32\.0, now vLLM 0\.33\.0\); give another --out",
        ),
        ({"settings": {"max_num_seqs": 64}}, r"another settings \(max_num_seqs 32, now 64\)"),
        ({"device": "another machine"}, r"another device \(a machine, now another machine\)"),
    ],
)
def test_a_folder_of_another_engine_is_not_continued(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    add_point(begun(tmp_path), "a#1")
    with pytest.raises(MeasurementError, match=message):
        MeasurementFolder(tmp_path).begin(meta(**changes))
    MeasurementFolder(tmp_path).begin(meta(date="2026-11-26"))


def test_a_full_disk_keeps_the_points_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = begun(tmp_path)
    add_point(measured, "a#1")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(
            MeasurementError, match=r"cannot be written \(No space left on device\); the 1 points before are kept"
        ):
            add_point(measured, "b#1")
    again = MeasurementFolder.existing(tmp_path)
    assert again.meta is not None
    assert [point.label for point in again.meta.points] == ["a#1"]


def test_an_unreadable_or_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="no measurement in it"):
        MeasurementFolder.existing(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(MeasurementError, match="not readable as a measurement"):
        MeasurementFolder(tmp_path)
