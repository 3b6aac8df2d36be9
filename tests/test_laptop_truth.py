"""Several checks of one fleet, and the middle of them."""

from dataclasses import replace
from math import hypot, nan
from pathlib import Path

import pytest

from benchmarks.laptop_truth import FILE, middle, verdicts
from calibrate.check.comparison import Figure
from calibrate.check.figures_file import read_figures, write_figures
from sim.fleet_file import load_fleet
from sim.spec import ALL_EXPERTS

FIGURE = Figure(
    load=4.0,
    expert=ALL_EXPERTS,
    column="mean_tpot_ms",
    predicted=30.0,
    predicted_low=28.0,
    predicted_high=33.0,
    measured=32.0,
    measured_low=31.0,
    measured_high=33.5,
    noise_floor=0.01,
    tolerance=0.05,
    noise_floors=2,
    predicted_at_pace=31.5,
)


def with_error(error: float, noise: float = 0.01) -> Figure:
    return replace(FIGURE, predicted=FIGURE.measured * (1 + error), noise_floor=noise)


def test_the_figures_of_a_check_are_read_as_they_were_written(tmp_path: Path) -> None:
    tolerances = load_fleet(FILE).check.tolerances
    shown = replace(FIGURE, column="median_itl_ms", tolerance=nan, predicted_at_pace=nan)
    expert = replace(FIGURE, expert="code", tolerance=nan)
    path = tmp_path / "check.csv"
    write_figures(path, [FIGURE, shown, expert])
    read = read_figures(path, tolerances)
    assert [(each.expert, each.column) for each in read] == [
        *((ALL_EXPERTS, "mean_tpot_ms"), (ALL_EXPERTS, "median_itl_ms"), ("code", "mean_tpot_ms"))
    ]
    assert read[0].predicted_at_pace == pytest.approx(31.5, rel=1e-5)
    assert replace(read[0], predicted_at_pace=31.5) == FIGURE
    assert [each.passes for each in read[1:]] == [None, None]


def test_the_middle_of_three_is_the_median_error_with_the_noise_of_all() -> None:
    found = middle([with_error(-0.12, 0.01), with_error(0.02, 0.02), with_error(-0.03, 0.02)])
    assert found.error == pytest.approx(-0.03)
    assert found.noise_floor == pytest.approx(hypot(0.01, 0.02, 0.02) / 3**0.5)
    assert middle([with_error(-0.12), with_error(0.02)]).error == pytest.approx(0.02)


def test_a_verdict_fails_on_the_middle_and_on_intervals_that_hold_too_little() -> None:
    good, bad = [with_error(0.01)], [with_error(0.08)]
    assert verdicts(good, [good, good, bad], 0.8)[0].startswith("- PASS")
    lines = verdicts(bad, [bad, bad, good], 0.8)
    assert lines[0].startswith("- FAIL")
    assert "mean_tpot_ms at load 4: +8.0%, limit 5.0%" in lines[1]
    missed = [replace(good[0], predicted_low=33.0)]
    assert verdicts(good, [good, good, missed], 0.8)[0].startswith("- FAIL")
