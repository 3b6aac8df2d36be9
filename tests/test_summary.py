from typing import Any

import numpy as np
import pytest
from scipy import stats

from sim.metrics import run_metrics
from sim.summary import confidence_bounds, summarize, summary_columns, summary_rows
from tests.run_records import make_fleet, make_run


def rows_of(replications: int) -> list[dict[str, Any]]:
    fleet = make_fleet("fleet", 2)
    return [
        row
        for load in (1, 100)
        for k in range(replications)
        for row in run_metrics(make_run(fleet, load, k), fleet, None)
    ]


def test_bounds_are_those_of_student_t() -> None:
    values = np.array([[3.0], [5.0], [4.0], [8.0]])
    mean, low, high = (bound[0] for bound in confidence_bounds(values))
    expected = stats.t.interval(0.95, df=3, loc=values.mean(), scale=stats.sem(values[:, 0]))
    assert mean == 5.0
    assert (low, high) == pytest.approx(expected)


def test_replications_that_do_not_know_a_figure_are_left_out() -> None:
    mean, low, high = confidence_bounds(np.array([[1.0, np.nan], [3.0, 7.0], [np.nan, np.nan]]))
    assert mean.tolist() == [2.0, 7.0]
    assert (low[0], high[0]) == pytest.approx(stats.t.interval(0.95, df=1, loc=2.0, scale=1.0))
    assert np.isnan([low[1], high[1]]).all()


def test_one_replication_has_no_bounds() -> None:
    row = summary_rows(rows_of(1))[0]
    assert row["output_throughput"] > 0
    assert np.isnan(row["output_throughput_low"])
    assert np.isnan(row["output_throughput_high"])


def test_counts_are_summed_and_constants_kept() -> None:
    row = summary_rows(rows_of(3))[0]
    assert (row["replications"], row["sent"], row["gpus"]) == (3, 1200, 2)


def test_one_row_per_fleet_load_and_expert_in_order_of_appearance() -> None:
    frame = summarize(rows_of(2))
    assert tuple(frame.columns) == summary_columns()
    assert list(zip(frame["users"], frame["expert"], strict=True)) == [
        (users, expert) for users in (1, 100) for expert in ("all", "expert-0", "expert-1")
    ]


def test_a_trace_is_one_load() -> None:
    fleet = make_fleet("fleet", 1)
    runs = [make_run(fleet, float("nan"), k, load_kind="trace") for k in range(2)]
    rows = summary_rows(row for run in runs for row in run_metrics(run, fleet, None))
    assert [(row["expert"], row["replications"]) for row in rows] == [("all", 2), ("expert-0", 2)]
