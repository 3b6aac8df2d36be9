import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from sim.feasibility import check_feasible
from sim.fleet_file import load_fleet, parse_fleet
from sim.metrics import run_metrics
from sim.outputs import FORMATS, resolved_yaml, result_json, write_result
from sim.records import COMPLETED, REQUEST_COLUMNS
from sim.resolve import resolve_fleet
from sim.result import Result
from sim.spec import FleetFile, SloSpec
from sim.summary import summary_columns
from sim.vllm_result import vllm_result
from tests.run_records import make_result

VLLM_KEYS = {
    *("backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"),
    *("request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
    *("max_concurrent_requests", "input_lens", "output_lens", "ttfts", "latencies", "start_times", "queue_times"),
    *(f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p99") for metric in ("ttft", "tpot", "itl", "e2el")),
    "errors",
}


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_result(make_result(slo=SloSpec(ttft_ms=100)), tmp_path / name, FORMATS)
    first = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert {path.suffix for path in first} == {".csv", ".parquet", ".yaml", ".png", ".svg", ".json"}
    assert [
        path for path in first if (tmp_path / "first" / path).read_bytes() != (tmp_path / "second" / path).read_bytes()
    ] == []


def test_it_returns_the_files_it_wrote(tmp_path: Path) -> None:
    written = write_result(make_result(), tmp_path, FORMATS)
    assert sorted(written) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"formats must be among csv.*got xlsx"):
        write_result(make_result(), tmp_path, ("csv", "xlsx"))


def test_a_failing_write_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_result()
    write_result(result, tmp_path, ("csv",))
    before = (tmp_path / "summary.csv").read_bytes()

    def interrupt(value: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("sim.outputs._csv_cell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_result(result, tmp_path, ("csv",))
    assert (tmp_path / "summary.csv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.resolved.yaml", "summary.csv"]


def test_summary_csv_has_empty_cells_for_what_is_unknown(tmp_path: Path) -> None:
    write_result(make_result(), tmp_path, ("csv",))
    with (tmp_path / "summary.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == summary_columns()
    assert [(row["fleet"], row["users"], row["expert"]) for row in rows][-2:] == [
        ("baseline", "100", "all"),
        ("baseline", "100", "expert-0"),
    ]
    assert rows[0]["request_goodput"] == ""
    assert float(rows[0]["mean_ttft_ms"]) > 0


def test_requests_parquet_round_trips(tmp_path: Path) -> None:
    result = make_result()
    write_result(result, tmp_path, ("parquet",))
    read = pd.read_parquet(tmp_path / "requests.parquet")
    pd.testing.assert_frame_equal(read, result.requests, check_categorical=False)
    assert [name for name in REQUEST_COLUMNS if name != "status" and read[name].dtype != REQUEST_COLUMNS[name]] == []


def test_the_resolved_file_is_a_fleet_file_with_seed_and_version(tmp_path: Path) -> None:
    result = make_result()
    write_result(result, tmp_path, ())
    text = (tmp_path / "fleet.resolved.yaml").read_text()
    assert FleetFile.model_validate(yaml.safe_load(text)) == result.file
    assert "expert-router 0.1.0, seed 1" in text
    assert "num_kv_blocks: 20000" in text


def test_an_interrupted_result_without_runs_is_still_written(tmp_path: Path) -> None:
    write_result(make_result((), interrupted=True), tmp_path, FORMATS)
    assert "interrupted" in (tmp_path / "fleet.resolved.yaml").read_text()
    assert len(pd.read_parquet(tmp_path / "requests.parquet")) == 0


def test_result_json_is_strict_and_has_null_for_unknown() -> None:
    result = make_result()
    read = strict(result_json(result))
    assert len(read["summary"]) == len(result.summary_rows)
    assert read["summary"][0]["request_goodput"] is None
    assert read["fleets"]["fleet 0"]["expert-0"]["curve"]["label"] == "roofline, not calibrated"


def test_vllm_json_has_vllms_keys_and_the_same_figures_as_the_summary(tmp_path: Path) -> None:
    result = make_result(slo=SloSpec(ttft_ms=100), replications=1)
    write_result(result, tmp_path, ("vllm",))
    read = strict((tmp_path / "vllm" / "fleet_0-concurrency100-r0.json").read_text())
    assert VLLM_KEYS - set(read) == set()
    run = result.runs[1]
    row = run_metrics(run, result.fleets["fleet 0"], result.file.slo)[0]
    shared = [name for name in row if name in read and name not in ("completed", "failed")]
    assert len(shared) > 16
    assert {name: read[name] for name in shared} == {name: pytest.approx(row[name]) for name in shared}
    assert (read["request_rate"], read["max_concurrency"]) == ("inf", 100)


def test_vllm_json_lists_every_request_that_ended_in_the_window() -> None:
    result = make_result(requests=300)
    run = result.runs[0]
    read = vllm_result(run, result.fleets["fleet 0"], result.file)
    assert read["num_prompts"] == read["completed"] + read["failed"] == 297
    assert {len(read[name]) for name in ("input_lens", "output_lens", "ttfts", "latencies", "errors")} == {297}
    failed = [place for place, error in enumerate(read["errors"]) if error]
    assert len(failed) == read["failed"] > 0
    assert all(np.isnan(read["ttfts"][place]) for place in failed)


def test_max_concurrent_requests_counts_requests_that_touch_one_second() -> None:
    result = make_result((1,), replications=1, requests=5)
    requests = result.runs[0].requests
    requests["status"][:] = COMPLETED
    requests["sent_s"][:] = [10.0, 10.5, 11.2, 13.0, 13.1]
    requests["last_token_s"][:] = [10.4, 11.1, 12.5, 13.05, 14.0]
    read = vllm_result(result.runs[0], result.fleets["fleet 0"], result.file)
    assert read["max_concurrent_requests"] == 2


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_resolved_file_can_be_simulated_again(path: Path) -> None:
    file = load_fleet(path)
    fleets = {name: resolve_fleet(file, name) for name in file.fleets}
    text = resolved_yaml(Result(file=file, fleets=fleets, runs=[], version="0"))
    again = parse_fleet(text, directory=path.parent)
    check_feasible(again)
    assert again.model_dump() == file.model_dump()
