"""What this project measured itself, in ``calibrate/data``: whole, and with the profiles that a fit makes of it."""

from pathlib import Path

import pytest

from calibrate.measure.files import META, MeasurementFolder
from calibrate.measure.measured_profile import fit_folder
from sim.profile import TermParameters, load_profile

DATA = Path(__file__).parent.parent / "calibrate" / "data"
FOLDERS = sorted(path.parent for path in DATA.glob(f"*/*/{META}"))


def test_there_are_measurements() -> None:
    assert {folder.name for folder in FOLDERS} >= {"code", "chat"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_profile_is_the_fit_to_what_was_measured(folder: Path) -> None:
    found = fit_folder(MeasurementFolder.existing(folder))
    kept = load_profile(folder.parent / f"{folder.name}.profile.json")
    assert found.matched == 1.0, "every logged batch is the simulated scheduler's"
    assert found.profile.expert == kept.expert
    assert found.profile.provenance == kept.provenance
    fitted, stored = found.profile.parameters, kept.parameters
    assert isinstance(fitted, TermParameters)
    assert isinstance(stored, TermParameters)
    for name in ("per_iteration", "per_token", "per_decode", "per_kv_token"):
        value, expected = getattr(fitted, name).value, getattr(stored, name).value
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_no_path_of_a_machine_is_among_it(folder: Path) -> None:
    meta = MeasurementFolder.existing(folder).meta
    assert meta is not None
    assert not [word for word in (*meta.engine_command, *meta.command) if word.startswith("/")]
