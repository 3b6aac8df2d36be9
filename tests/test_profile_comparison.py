from pathlib import Path

import pytest
from click.testing import CliRunner

from calibrate.fit.profile_comparison import (
    BATCHES,
    PROMPTS,
    column_names,
    compare_profiles,
    comparison_markdown,
    decode_work,
    prefill_work,
    read_curve,
)
from sim.cli import main
from tests.profiles import make_profile


def profile_file(folder: Path, name: str, quantization: str = "bf16") -> Path:
    path = folder / f"{name}.profile.json"
    path.write_text(make_profile(name, quantization=quantization, error=0.1).model_dump_json())
    return path


def test_the_same_work_is_timed_by_every_profile(tmp_path: Path) -> None:
    first, second = (read_curve(profile_file(tmp_path, name)) for name in ("a", "b"))
    rows = compare_profiles([first, second])
    assert len(rows) == len(BATCHES) + len(PROMPTS)
    for row, work in zip(rows, [*map(decode_work, BATCHES), *map(prefill_work, PROMPTS)], strict=True):
        assert row.seconds == (first[1].iteration_s(work), second[1].iteration_s(work))
        assert list(row.ratios) == pytest.approx([1.0, 1.0])
        assert row.errors[0] == 0
        assert row.errors[1] >= 0.1 * 2**0.5 * (1 - 1e-9)


def test_work_beyond_what_was_measured_is_marked(tmp_path: Path) -> None:
    curves = [read_curve(profile_file(tmp_path, name)) for name in ("a", "b")]
    rows = {row.what: row for row in compare_profiles(curves)}
    assert all(rows[f"decode, {batch} requests"].beyond == (True, True) for batch in BATCHES), "fitted on 1 KV token"
    assert rows["decode, 64 requests"].errors[1] > rows["decode, 4 requests"].errors[1] > 0.1 * 2**0.5
    page = comparison_markdown([p for p, _ in curves], list(rows.values()), title="T", command="c", picture="p.png")
    assert "| decode, 1 requests | 10.0 (e) | 10.0 (e)<br>" in page


def test_columns_are_named_by_what_differs() -> None:
    assert column_names([make_profile("a"), make_profile("b")]) == ["a", "b"]
    assert column_names([make_profile("a"), make_profile("b", quantization="int8")]) == ["bf16", "int8"]


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    files = [str(profile_file(tmp_path, name)) for name in ("a", "b")]
    done = CliRunner().invoke(main, ["calibrate", "compare", *files, "--report", str(tmp_path / "q.md")])
    assert done.exit_code == 0, done.output
    assert "decode, 16 requests" in done.output
    assert "![iteration times](q.png)" in (tmp_path / "q.md").read_text()
    assert (tmp_path / "q.png").stat().st_size > 10_000


def test_one_profile_or_none_that_can_be_read_is_a_clear_error(tmp_path: Path) -> None:
    file = str(profile_file(tmp_path, "a"))
    assert "at least two" in CliRunner().invoke(main, ["calibrate", "compare", file]).output
    done = CliRunner().invoke(main, ["calibrate", "compare", file, str(tmp_path / "missing.json")])
    assert done.exit_code == 2
    assert "missing.json" in done.output
