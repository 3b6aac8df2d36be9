"""A check of a fleet that does exactly what is predicted finds nothing wrong, whatever the kind of load."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest

import calibrate.check.check
from calibrate.check.check import check
from calibrate.check.check_report import check_markdown, write_check
from calibrate.check.turns import of_repeat
from sim.fleet_file import load_fleet
from sim.run import simulate

LOADS = {
    "closed loop": "{kind: closed_loop, users: [1, 4]}",
    "open loop": "{kind: open_loop, rate_rps: [1, 4]}",
    "trace": "{kind: trace, file: trace.csv, format: azure}",
}
FILE = """
workload:
  classes: {any: {prompt_tokens: {distribution: uniform, min: 10, max: 90}, output_tokens: 8}}
  load: LOAD
run: {duration_s: 30, warm_up_s: 2}
fleets: {one: {experts: {chat: {model: laptop-16m, gpu: CPU}}}}
"""


@contextmanager
def step(what: str) -> Iterator[None]:
    yield None


@pytest.mark.parametrize("kind", LOADS)
def test_a_fleet_that_does_what_is_predicted_passes(tmp_path: Path, kind: str) -> None:
    rows = "".join(f"2024-05-10 00:00:{second:02}.5,{20 + second % 7},8\n" for second in range(30))
    (tmp_path / "trace.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    (tmp_path / "fleet.yaml").write_text(FILE.replace("LOAD", LOADS[kind]))
    file = load_fleet(tmp_path / "fleet.yaml")
    measured = [simulate(of_repeat(file, repeat), workers=1) for repeat in range(2)]
    outcome = check(file, "one", measured, {}, folder=tmp_path, step=step)
    assert outcome.passed
    assert all(figure.error == 0 for figure in outcome.figures if not isnan(figure.error))
    assert {station.load for station in outcome.stations if not isnan(station.load)} == (
        set() if kind == "trace" else {1, 4}
    )
    assert outcome.stations
    assert len(outcome.predicted) == 2
    assert (tmp_path / "predicted-2").is_dir()
    assert "PASS" in check_markdown(outcome)
    write_check(outcome, tmp_path)


def test_nothing_measured_is_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FILE.replace("LOAD", LOADS["closed loop"]))
    outcome = check(load_fleet(tmp_path / "fleet.yaml"), "one", [], {}, folder=tmp_path, step=step, interrupted=True)
    assert not outcome.figures
    assert not outcome.passed


def test_a_stop_while_simulating_is_no_verdict_on_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fleet.yaml").write_text(FILE.replace("LOAD", LOADS["closed loop"]))
    file = load_fleet(tmp_path / "fleet.yaml")
    measured = [simulate(of_repeat(file, 0), workers=1)]
    monkeypatch.setattr(
        calibrate.check.check, "simulate", lambda *args, **named: replace(simulate(*args, **named), interrupted=True)
    )
    with pytest.raises(KeyboardInterrupt):
        check(file, "one", measured, {}, folder=tmp_path, step=step)
