"""A check calibrates before, in between and behind its real runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import calibrate.check.turns
from calibrate.check.turns import take_turns
from calibrate.measure.files import MeasurementError
from sim.fleet_file import LoadedFleetFile, parse_fleet
from sim.result import Result
from sim.run import simulate

FILE = """
workload:
  classes: {any: {prompt_tokens: 20, output_tokens: 5}}
  load: {kind: closed_loop, users: 1}
run: {duration_s: 5, warm_up_s: 1, replications: 3, seed: 7}
check: {repeats: 2}
fleets: {one: {experts: {chat: {model: laptop-16m, gpu: CPU}}}}
"""


class Turns:
    """What happens, in order; ``stops`` at one of these, by Ctrl-C, or ``loses`` its engine in one."""

    def __init__(self, stops: str = "", *, loses: str = ""):
        self.events: list[str] = []
        self.experts = ["chat"]
        self.served = SimpleNamespace(name="one", url="http://x", replica_urls={}, start_gateway=self.start_gateway)
        self._stops = stops
        self._loses = loses

    def measure(self, expert: str, *, minutes: float, share: float) -> bool:
        self._happens(f"{minutes * share:g} min of {expert}")
        return self.events[-1] != self._loses

    def start_gateway(self) -> None:
        self._happens("gateway")

    def run(self, file: LoadedFleetFile, **_: Any) -> Result:
        assert (file.run.replications, file.run.seed) == (1, 7 + self.events.count("run"))
        self._happens("run")
        stopped = self.events.count("run") == 2 and self._stops == "second run"
        return replace(simulate(file, workers=1), interrupted=stopped)

    def _happens(self, event: str) -> None:
        if event == self._stops:
            raise KeyboardInterrupt
        self.events.append(event)


@contextmanager
def step(what: str) -> Iterator[None]:
    yield None


def take(turns: Turns, folder: Path, monkeypatch: pytest.MonkeyPatch, *, calibrates: bool = True) -> tuple[int, bool]:
    monkeypatch.setattr(calibrate.check.turns, "run", turns.run)
    calibration: Any = turns if calibrates else None
    served: Any = turns.served
    measured, stopped = take_turns(parse_fleet(FILE), served, calibration, minutes=3, folder=folder, step=step)
    assert [folder.joinpath(f"measured-{n + 1}").is_dir() for n in range(len(measured))] == [True] * len(measured)
    return len(measured), stopped


def test_calibration_and_runs_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    assert take(turns, tmp_path, monkeypatch) == (2, False)
    assert turns.events == ["1 min of chat", "gateway", "run", "2 min of chat", "run", "3 min of chat"]


def test_a_calibrated_fleet_only_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    assert take(turns, tmp_path, monkeypatch, calibrates=False) == (2, False)
    assert turns.events == ["gateway", "run", "run"]


@pytest.mark.parametrize(
    ("stops", "runs", "last"),
    [("second run", 2, "run"), ("2 min of chat", 1, "run"), ("3 min of chat", 2, "run")],
)
def test_what_was_measured_before_a_stop_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: str, runs: int, last: str
) -> None:
    turns = Turns(stops)
    assert take(turns, tmp_path, monkeypatch) == (runs, True)
    assert turns.events[-1] == last


def test_a_stop_before_any_run_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        take(Turns("1 min of chat"), tmp_path, monkeypatch)


def test_an_engine_lost_behind_a_run_does_not_lose_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(loses="2 min of chat")
    assert take(turns, tmp_path, monkeypatch) == (1, True)


def test_what_cannot_be_measured_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(loses="1 min of chat")
    with pytest.raises(MeasurementError, match="the same command goes on"):
        take(turns, tmp_path, monkeypatch)
    assert turns.events == ["1 min of chat"]
