"""What this project measured itself, in ``calibrate/data``: whole, and with the profiles that a fit makes of it."""

from pathlib import Path

import pytest

from calibrate.fit.iteration_fit import fit_best
from calibrate.measure.files import META, MeasurementFolder
from calibrate.measure.measured_profile import graph_sizes, provenance, told
from sim.profile import TermParameters, load_profile

DATA = Path(__file__).parent.parent / "calibrate" / "data"
FOLDERS = sorted(path.parent for path in DATA.glob(f"*/*/{META}"))


def test_there_are_measurements() -> None:
    assert {folder.name for folder in FOLDERS} >= {"code", "chat"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_profile_is_the_fit_to_what_was_measured(folder: Path) -> None:
    measured = MeasurementFolder.existing(folder)
    kept = load_profile(folder.parent / f"{folder.name}.profile.json")
    assert measured.meta is not None
    assert measured.iterations["matched"].all(), "every logged batch is the simulated scheduler's"
    assert measured.meta.expert == kept.expert
    assert provenance(measured.meta) == kept.provenance
    fitted, stored = fit_best(told(measured), graph_sizes=graph_sizes(measured.meta)), kept.parameters
    assert isinstance(stored, TermParameters)
    for name, value in fitted.terms.items():
        assert value == pytest.approx(getattr(stored, name).value, rel=1e-3, abs=1e-9), name
    assert (fitted.host is None) == (stored.host is None)
    for name, value in (fitted.host.terms if fitted.host is not None else {}).items():
        assert value == pytest.approx(getattr(stored.host, name).value, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_no_path_of_a_machine_is_among_it(folder: Path) -> None:
    meta = MeasurementFolder.existing(folder).meta
    assert meta is not None
    assert not [word for word in (*meta.engine_command, *meta.command) if word.startswith("/")]
