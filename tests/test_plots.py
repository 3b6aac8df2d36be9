from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from sim.plots import pictures, save_picture, spread
from sim.result import Result
from sim.spec import SloSpec
from tests.run_records import make_gaps, make_result

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "loads", "names"),
    [
        ("closed_loop", (1, 30, 1000), {"ttft", "time_per_output_token", "output_throughput"}),
        ("open_loop", (0.5, 1, 2), {"ttft", "time_per_output_token", "output_throughput"}),
        ("closed_loop", (100,), {"ttft", "time_per_output_token", "output_throughput"}),
        ("trace", (NAN,), {"ttft", "time_per_output_token", "e2el"}),
    ],
)
@pytest.mark.parametrize("form", ["png", "svg"])
def test_every_kind_of_load_has_its_pictures(
    kind: str, loads: tuple[float, ...], names: set[str], form: str, tmp_path: Path
) -> None:
    figures = pictures(make_result(loads, load_kind=kind, slo=SloSpec(ttft_ms=100, tpot_ms=1e5)))
    assert set(figures) == names
    for name, figure in figures.items():
        save_picture(figure, tmp_path / name, form)
        assert (tmp_path / name).stat().st_size > 5000


def everything_failed(result: Result) -> Result:
    """The same result with nothing completed in any window, so that every latency is unknown."""
    return replace(result, runs=[replace(run, window_s=(1e6, 2e6), gaps=make_gaps()) for run in result.runs])


@pytest.mark.parametrize(("kind", "loads"), [("closed_loop", (1, 10)), ("closed_loop", (1,)), ("trace", (NAN,))])
def test_unknown_figures_leave_an_empty_picture(kind: str, loads: tuple[float, ...], tmp_path: Path) -> None:
    for name, figure in pictures(everything_failed(make_result(loads, load_kind=kind))).items():
        save_picture(figure, tmp_path / name, "png")


def test_the_title_says_what_and_which_curve() -> None:
    figure = pictures(make_result())["ttft"]
    assert figure.get_suptitle() == "Time to first token (roofline, not calibrated)"


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    result = make_result()
    named = replace(result, file=result.file.model_copy(update={"name": "$2 and $"}))
    save_picture(pictures(named)["ttft"], tmp_path / "ttft", "svg")


def test_every_fleet_is_labelled_once() -> None:
    axes = pictures(make_result(fleets=9))["output_throughput"].axes[0]
    labels = [text.get_text() for text in axes.texts]
    assert labels == [*(f"fleet {index}" for index in range(8)), "baseline"]


def test_matplotlib_is_left_as_it_was() -> None:
    before = dict(mpl.rcParams)
    pictures(make_result())
    assert dict(mpl.rcParams) == before


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    heights = spread([0.5, 0.51, 0.1, 0.99, 1.0], 0.05)
    assert np.argsort(heights).tolist() == [2, 0, 1, 3, 4]
    assert np.diff(sorted(heights)).min() >= 0.05 - 1e-12
    assert max(heights) <= 1
    assert heights[2] == pytest.approx(0.1)
