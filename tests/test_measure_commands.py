"""The commands around measured engines: what they print, write, and refuse."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from calibrate.calibrate_command import command
from calibrate.measure.grid import lengths_of
from calibrate.measure.one_engine import measure_expert
from sim.profile import load_profile
from sim.traffic import WorkloadData
from tests.engine_server import EngineServer
from tests.iteration_runs import SETTINGS
from tests.test_measure import EXPERT


def run(*words: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "expert"
    measure_expert(
        "expert",
        EXPERT,
        folder=folder,
        lengths=lengths_of(None, WorkloadData(), 512),
        minutes=0.1,
        start=lambda *_: EngineServer(folder, SETTINGS),
    )
    return folder


@pytest.mark.parametrize("which", ["expert", "parent"])
def test_fit_turns_a_measured_folder_into_profiles(folder: Path, tmp_path: Path, which: str) -> None:
    output = run("fit", folder if which == "expert" else folder.parent, "--out", tmp_path)
    assert "per_iteration" in output
    (path,) = tmp_path.glob("*.json")
    assert load_profile(path).expert.model == "laptop-16m"


def test_fit_refuses_a_folder_without_a_measurement_and_options_for_tables(folder: Path, tmp_path: Path) -> None:
    assert "no measurement in it; expert-router calibrate measure writes one" in run("fit", tmp_path, status=2)
    assert "only --out applies" in run("fit", folder, "--llama-family", status=2)


def test_batches_shows_the_agreement_of_live_batches(folder: Path, tmp_path: Path) -> None:
    output = run("batches", folder)
    assert "real and simulated batches under live arrivals" in output
    assert "100.0%" in output
    assert "no measurement in it" in run("batches", tmp_path, status=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either a fleet file or --model and --gpu"),
        (["--model", "laptop-16m"], "--model needs --gpu"),
        (["nowhere.yaml", "--gpu", "CPU"], "--gpu and --quantization go with --model"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--model", "laptop-16n", "--gpu", "CPU"], "unknown model 'laptop-16n', did you mean"),
        (["--model", "llama-3-70b", "--gpu", "L40S"], "needs 1"),
    ],
)
def test_measure_refuses_what_makes_no_sense(words: list[str], message: str) -> None:
    assert message in run("measure", *words, status=2)
