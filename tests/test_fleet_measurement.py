"""The engines of a fleet file are measured a part at a time, and what was measured is written as a calibrated file."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from calibrate.measure.engine_under_test import EngineGoneError, EngineUnderTest, Start
from calibrate.measure.fleet import FleetMeasurement
from calibrate.measure.measured_experts import CALIBRATED_FILE, distinct_experts
from sim.fleet_file import LoadedFleetFile, load_fleet, parse_fleet
from sim.spec import ExpertSpec
from tests.engine_server import EngineServer
from tests.iteration_runs import SETTINGS

FILE = """
workload:
  classes: {any: {prompt_tokens: 20, output_tokens: 5}}
  load: {kind: closed_loop, users: 1}
fleets: {one: {experts: {chat: {model: laptop-16m, gpu: CPU, engine: {enforce_eager: true}}}}}
"""


def started(name: str, spec: ExpertSpec, cores: tuple[int, ...], port: int, folder: Path) -> EngineUnderTest:
    return EngineServer(folder, SETTINGS)


def refused(name: str, spec: ExpertSpec, cores: tuple[int, ...], port: int, folder: Path) -> EngineUnderTest:
    raise EngineGoneError(f"{name}/0: the model does not fit")


@pytest.fixture
def file() -> LoadedFleetFile:
    return parse_fleet(FILE)


def measurement(file: LoadedFleetFile, out: Path, start: Start) -> tuple[FleetMeasurement, StringIO]:
    told = StringIO()
    console = Console(file=told, width=200)
    return FleetMeasurement(file, distinct_experts(file), out=out, messages=console, console=console, start=start), told


def test_engines_are_measured_a_part_at_a_time_and_then_written(file: LoadedFleetFile, tmp_path: Path) -> None:
    measured, told = measurement(file, tmp_path, started)
    (chat,) = measured.experts
    assert measured.measure(chat, minutes=0.1, share=0.5)
    assert not measured.is_complete
    assert measured.measure(chat, minutes=0.1)
    assert measured.is_complete
    assert not (tmp_path / "chat.profile.json").exists()
    measured.fit(chat)
    assert measured.write()
    profile = load_fleet(tmp_path / CALIBRATED_FILE).fleets["one"].experts["chat"].profile
    assert profile is not None
    assert Path(profile).name == "chat.profile.json"
    lines = told.getvalue().splitlines()
    for line in ("chat: waiting for the engine", "chat: measuring until 3 s are measured"):
        assert line in lines
    assert "chat: measuring until 6 s are measured" in lines


def test_an_engine_that_does_not_come_up_is_told_and_left_out(file: LoadedFleetFile, tmp_path: Path) -> None:
    measured, told = measurement(file, tmp_path, refused)
    (chat,) = measured.experts
    assert not measured.measure(chat, minutes=0.1)
    measured.fit(chat)
    assert not measured.write()
    assert "chat/0: the model does not fit" in told.getvalue()
    assert not list(tmp_path.glob("*.json"))
