import gzip
import math
from pathlib import Path

import pytest

from calibrate.tables.csv_table import TableError
from calibrate.tables.measured_runs import METRICS, read_measured_requests, read_measured_runs, run_of_settings
from tests.measured_tables import GROUND_TRUTH, ROW, write_table

RUNS = GROUND_TRUTH / "serving_runs.csv"
REQUESTS = GROUND_TRUTH / "requests.csv.gz"


def test_a_row_becomes_a_run_with_units_and_missing_is_not_zero(tmp_path: Path) -> None:
    (run,) = read_measured_runs(write_table(tmp_path / "runs.csv", [ROW]))
    assert (run.run_id, run.tp, run.max_model_len, run.kv_blocks) == ("ours/a/s0", 1, 4096, 20001)
    assert (run.prefix_caching, run.chunked_prefill) == (True, None)
    assert run.prompt_tokens_mean == 600
    assert math.isnan(run.ttft_mean_s)
    assert run.measured() == {"e2e_mean": 1.5}


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("tp", "two", "a whole number >= 0"),
        ("tp", "1.5", "a whole number >= 0"),
        ("tp", "0", "a whole number >= 1"),
        ("e2e_mean", "-1", "a number >= 0"),
        ("e2e_mean", "nan", "a number >= 0"),
        ("prefix_caching", "yes", "True or False"),
        ("load_type", "closed", "one of open_loop, closed_loop, saturated_closed_loop, burst"),
        ("model", "", "a value"),
    ],
)
def test_a_broken_cell_is_named_with_file_line_column_and_value(
    tmp_path: Path, column: str, value: str, expected: str
) -> None:
    path = write_table(tmp_path / "runs.csv", [ROW, ROW | {"run_id": "ours/a/s1", column: value}])
    with pytest.raises(TableError) as caught:
        read_measured_runs(path)
    assert f"{path}: line 3: column {column!r}: got {value!r}, expected {expected}" in str(caught.value)


def test_missing_columns_are_listed(tmp_path: Path) -> None:
    row = {column: value for column, value in ROW.items() if column not in ("gpu", "tp")}
    with pytest.raises(TableError, match=r"line 1: columns missing: gpu, tp$"):
        read_measured_runs(write_table(tmp_path / "runs.csv", [row]))


def test_a_run_may_occur_once(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"line 3: column 'run_id'.*line 2 has it too"):
        read_measured_runs(write_table(tmp_path / "runs.csv", [ROW, ROW]))


def test_a_truncated_table_names_line_and_column(tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", [ROW, ROW | {"run_id": "ours/a/s1"}])
    text = path.read_text()
    path.write_text(text[: text.rindex("4096.0")])
    with pytest.raises(TableError, match=r"line 3: column 'max_model_len'.*truncated"):
        read_measured_runs(path)


def test_a_truncated_compressed_table_says_so(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv.gz"
    packed = gzip.compress(b"run_id,arrival_s,in_tok,out_tok,ttft_s,e2e_s\n" + b"a,0.5,10,20,0.1,0.9\n" * 5000)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(TableError, match="truncated"):
        read_measured_requests(path)


def test_a_file_that_is_not_there_is_a_measurement_error(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot be read"):
        read_measured_runs(tmp_path / "none.csv")


def test_requests_come_by_run_in_order_of_arrival(tmp_path: Path) -> None:
    rows = [
        {"run_id": "b", "arrival_s": 2, "in_tok": 5, "out_tok": 6, "ttft_s": 0.1, "e2e_s": 0.2, "ok": 1},
        {"run_id": "b", "arrival_s": 1, "in_tok": 0, "out_tok": 8, "ttft_s": "", "e2e_s": 300, "ok": 0},
        {"run_id": "a", "arrival_s": 0, "in_tok": 1, "out_tok": 1, "ttft_s": 0.1, "e2e_s": 0.1, "ok": 1},
    ]
    found = read_measured_requests(write_table(tmp_path / "requests.csv", rows))
    assert {run_id: len(requests) for run_id, requests in found.items()} == {"b": 2, "a": 1}
    assert found["b"].arrival_s.tolist() == [1, 2]
    assert found["b"].completed.tolist() == [False, True]
    assert math.isnan(found["b"].ttft_s[0])


def test_settings_of_an_engine_are_checked_like_cells() -> None:
    run = run_of_settings(["gpu=H100", "tp=2", "prefix_caching=False"])
    assert (run.gpu, run.tp, run.prefix_caching) == ("H100", 2, False)
    for wrong in (["gpu=H100", "tp=x"], ["gpu=H100", "colour=red"], ["gpu"], []):
        with pytest.raises(TableError):
            run_of_settings(wrong)


@pytest.mark.skipif(not RUNS.is_file(), reason=f"no {RUNS}; set EXPERT_ROUTER_GROUND_TRUTH to its folder")
def test_the_shared_tables_are_read_whole_and_agree_with_each_other() -> None:
    runs, requests = read_measured_runs(RUNS), read_measured_requests(REQUESTS)
    assert len(runs) == 233
    assert sum(len(table) for table in requests.values()) == 98_378
    assert {metric for run in runs for metric in run.measured()} == set(METRICS) - {"itl_mean"}
    recorded = [run for run in runs if run.run_id in requests and run.n_fail == 0 and "ttft_mean" in run.measured()]
    assert len(recorded) > 15
    for run in recorded:
        assert requests[run.run_id].ttft_s.mean() == pytest.approx(run.ttft_mean_s, rel=0.01), run.run_id
