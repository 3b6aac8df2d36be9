"""A measurement is a sequence of points, each on disk before the next, that goes on after whatever stopped it."""

from pathlib import Path

import numpy as np
import pytest

from calibrate.measure.engine_under_test import EngineGoneError, EngineUnderTest
from calibrate.measure.files import MeasurementError, MeasurementFolder
from calibrate.measure.folder_fit import measured_folders
from calibrate.measure.grid import Lengths, first_design, lengths_of
from calibrate.measure.measured_profile import fit_folder
from calibrate.measure.one_engine import CHECK_SHARE, MOST_RESTARTS, Outcome, measure_expert
from sim.profile import TermParameters
from sim.spec import EngineSpec, ExpertSpec
from sim.traffic import WorkloadData
from tests.engine_server import EngineServer
from tests.iteration_runs import SETTINGS

EXPERT = ExpertSpec(model="laptop-16m", gpu="CPU", engine=EngineSpec(enforce_eager=True))
LENGTHS = lengths_of(None, WorkloadData(), 512)


class Starts:
    """Starts engines, one after another, and remembers them."""

    def __init__(self, *dies_after: int | None):
        self.engines: list[EngineServer] = []
        self._dies_after = list(dies_after)

    def __call__(self, name: str, spec: ExpertSpec, cores: tuple[int, ...], port: int, folder: Path) -> EngineUnderTest:
        dies_after = self._dies_after[len(self.engines)] if len(self.engines) < len(self._dies_after) else None
        self.engines.append(EngineServer(folder, SETTINGS, dies_after=dies_after))
        return self.engines[-1]


def measure(
    folder: Path, minutes: float, start: Starts, lengths: Lengths = LENGTHS, seen: list[str] | None = None
) -> Outcome:
    return measure_expert(
        "expert",
        EXPERT,
        folder=folder,
        lengths=lengths,
        minutes=minutes,
        start=start,
        progress=lambda _, what: None if seen is None else seen.append(what),
    )


def labels(folder: Path) -> list[str]:
    meta = MeasurementFolder.existing(folder).meta
    assert meta is not None
    return [point.label for point in meta.points]


def test_a_measurement_becomes_a_profile(tmp_path: Path) -> None:
    seen: list[str] = []
    outcome = measure(tmp_path / "expert", 0.15, Starts(), seen=seen)
    assert outcome.complete
    assert seen[0] == "expert: waiting for the engine"
    names = [label.partition("#")[0] for label in labels(tmp_path / "expert")]
    assert names[0] == "reference"
    assert {"idle", "steps", "closed"} <= {name.partition(" ")[0] for name in names}
    found = fit_folder(MeasurementFolder.existing(tmp_path / "expert"))
    assert found.matched == 1.0
    # With little time left the closed-loop points have few users, and one of a few iterations tells no error.
    closed = [name for name in names if name.startswith("closed")]
    assert len(closed) == 2
    assert found.check
    assert set(found.check) <= set(closed)
    profile = found.profile
    assert isinstance(profile.parameters, TermParameters)
    assert profile.parameters.per_iteration.value > 5e-4
    assert profile.range.max_decodes == SETTINGS.max_num_seqs
    assert profile.num_gpu_blocks == SETTINGS.num_kv_blocks + 1
    assert profile.front_end is not None
    assert "vLLM 0.0.test" in profile.provenance
    assert measured_folders(tmp_path) == [tmp_path / "expert"]


def test_it_goes_on_where_it_stopped_and_measures_nothing_twice(tmp_path: Path) -> None:
    measure(tmp_path, 0.05, Starts())
    before = labels(tmp_path)
    starts = Starts()
    outcome = measure(tmp_path, 0.08, starts)
    assert outcome.complete
    assert labels(tmp_path)[: len(before)] == before
    assert len(set(labels(tmp_path))) == len(labels(tmp_path))
    again = Starts()
    assert measure(tmp_path, 0.08, again).complete
    assert not again.engines  # nothing is left to measure, so nothing is started


def test_a_lost_engine_is_started_again_and_the_point_measured_again(tmp_path: Path) -> None:
    starts = Starts(90)
    outcome = measure(tmp_path, 0.08, starts)
    assert outcome.complete
    assert len(starts.engines) == 2
    meta = outcome.measured.meta
    assert meta is not None
    assert meta.restarts == 1
    assert outcome.measured.iterations["matched"].all()


def test_an_engine_lost_again_and_again_ends_it_with_what_there_is(tmp_path: Path) -> None:
    starts = Starts(*[90] * (MOST_RESTARTS + 1))
    outcome = measure(tmp_path, 5.0, starts)
    assert not outcome.complete
    assert len(starts.engines) == MOST_RESTARTS + 1
    assert "the engine ended during" in outcome.reason
    assert labels(tmp_path)


def test_an_engine_that_does_not_come_up_keeps_what_was_measured(tmp_path: Path) -> None:
    def refuse(name: str, spec: ExpertSpec, cores: tuple[int, ...], port: int, folder: Path) -> EngineUnderTest:
        raise EngineGoneError("expert/0: port 8100 is in use; set serve.expert_port to another, or end what uses it")

    with pytest.raises(EngineGoneError, match="port 8100 is in use"):
        measure_expert("expert", EXPERT, folder=tmp_path, lengths=LENGTHS, minutes=1, start=refuse)
    measure(tmp_path, 0.05, Starts())
    outcome = measure_expert("expert", EXPERT, folder=tmp_path, lengths=LENGTHS, minutes=1, start=refuse)
    assert not outcome.complete
    assert "port 8100 is in use" in outcome.reason


def test_too_short_a_measurement_says_so(tmp_path: Path) -> None:
    measure(tmp_path, 0.001, Starts())
    measured = MeasurementFolder(tmp_path)
    measured.iterations = measured.iterations.head(3)
    with pytest.raises(MeasurementError, match="measure for longer"):
        fit_folder(measured)


def test_what_comes_after_is_called_with_the_running_engine(tmp_path: Path) -> None:
    running: list[bool] = []
    measure_expert(
        "expert",
        EXPERT,
        folder=tmp_path,
        lengths=LENGTHS,
        minutes=0.02,
        start=Starts(),
        afterwards=lambda engine: running.append(engine.is_running()),
    )
    assert running == [True]


def test_a_share_of_a_measurement_leaves_the_rest_for_another_time(tmp_path: Path) -> None:
    def part(share: float) -> Outcome:
        return measure_expert(
            "expert", EXPERT, folder=tmp_path, lengths=LENGTHS, minutes=0.12, share=share, start=Starts()
        )

    first = part(0.5)
    assert (first.complete, first.reason) == (False, "")
    before = labels(tmp_path)
    assert not any(label.startswith("closed") for label in before)
    assert part(0.5).measured.meta == first.measured.meta, "that share is measured already"
    last = part(1.0)
    assert last.complete
    assert labels(tmp_path)[: len(before)] == before
    assert sum(label.startswith("closed") for label in labels(tmp_path)) == 2


def test_the_first_points_come_again_in_every_third_of_the_time(tmp_path: Path) -> None:
    outcome = measure(tmp_path, 0.2, Starts())
    meta = outcome.measured.meta
    assert meta is not None
    third_s = 60 * 0.2 * (1 - CHECK_SHARE) / 3
    for first in first_design(SETTINGS, LENGTHS):
        began_s = [point.started_s for point in meta.points if point.label.startswith(f"{first.name}#")]
        assert 2 <= len(began_s) <= 3, first.name
        assert np.diff(began_s).min() >= third_s
