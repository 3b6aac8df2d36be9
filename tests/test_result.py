import numpy as np
import pytest

from sim.fleet_file import load_fleet
from sim.result import loads_label
from sim.run import simulate
from sim.simulate_command import fleet_path
from tests.run_records import make_result


def test_requests_are_every_request_of_every_run_with_names() -> None:
    result = make_result()
    frame = result.requests
    assert len(frame) == sum(len(run.requests["status"]) for run in result.runs)
    last = frame.iloc[-1]
    assert (last["fleet"], last["expert"], last["class"], last["status"]) == (
        "baseline",
        "expert-0",
        "class-0",
        "in_flight",
    )
    assert frame["expert"].dtype == "category"
    np.testing.assert_array_equal(frame["sent_s"][:120], result.runs[0].requests["sent_s"])


def test_a_request_without_an_expert_has_no_expert_name() -> None:
    result = make_result()
    result.runs[0].requests["expert_index"][0] = -1
    assert result.requests["expert"].isna().tolist().count(True) == 1


def test_a_result_without_runs_has_empty_frames() -> None:
    result = make_result(())
    assert (len(result.requests), len(result.summary), len(result.replications)) == (0, 0, 0)


def test_a_note_is_given_once_with_the_places_it_is_about() -> None:
    assert make_result(notes=("the backlog grows",)).notes == [
        "fleet 0 at 1 and 100 users; baseline at 1 and 100 users: the backlog grows"
    ]


def test_an_interrupted_result_says_so() -> None:
    assert make_result(interrupted=True).notes == [
        "interrupted: 8 runs had finished and are reported; the others are missing"
    ]


@pytest.mark.parametrize(
    ("kind", "loads", "label"),
    [
        ("closed_loop", [1], "1 user"),
        ("closed_loop", [1000, 1, 10, 10], "1, 10 and 1,000 users"),
        ("closed_loop", [1, 2, 4, 8, 4000], "5 loads from 1 to 4,000 users"),
        ("open_loop", [2.5], "2.5 req/s"),
        ("trace", [float("nan")], "the trace"),
    ],
)
def test_loads_are_named_for_people(kind: str, loads: list[float], label: str) -> None:
    assert loads_label(kind, loads) == label


def test_longer_iterations_make_every_answer_take_longer() -> None:
    with fleet_path(None) as path:
        file = load_fleet(path, ["run.replications=1"])
    plain = simulate(file, users=[8])
    slow = simulate(file, users=[8], iteration_time_factors={"chat": 1.2})
    rows = {row["expert"]: row["mean_tpot_ms"] for row in plain.summary_rows}
    slower = {row["expert"]: row["mean_tpot_ms"] for row in slow.summary_rows}
    assert slower["chat"] == pytest.approx(1.2 * rows["chat"], rel=0.05)
    assert slower["code"] == pytest.approx(rows["code"], rel=0.05)
    assert "times 1.2" in slow.curves["three experts"]["chat"].label
