import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from calibrate.tables.bench_results import read_bench_results
from calibrate.tables.csv_table import TableError
from calibrate.tables.measured_runs import run_of_settings
from sim.cli import main

ENGINE = run_of_settings(["gpu=H100", "model=llama-3.1-8b", "max_num_seqs=64", "engine_version=0.26.0"])

GUIDELLM_REQUEST = {
    "request_start_time": 1000.5,
    "prompt_tokens": 100,
    "output_tokens": 11,
    "time_to_first_token_ms": 50.0,
    "request_latency": 0.25,
}
AIPERF_RECORD = {
    "metadata": {"request_start_ns": 5_000_000_000, "benchmark_phase": "profiling"},
    "metrics": {
        "time_to_first_token": {"value": 50.0, "unit": "ms"},
        "request_latency": {"value": 250.0, "unit": "ms"},
        "input_sequence_length": {"value": 100, "unit": "tokens"},
        "output_sequence_length": {"value": 11, "unit": "tokens"},
    },
    "error": None,
}


def test_a_result_of_simulate_in_vllms_format_is_validated(tmp_path: Path) -> None:
    simulated = ["simulate", "--users", "4", "--replications", "1", "--out", str(tmp_path), "--format", "vllm"]
    assert CliRunner().invoke(main, simulated).exit_code == 0
    path = next(tmp_path.rglob("*.json"))
    result = json.loads(path.read_text())
    ((run, requests),) = read_bench_results(path, ENGINE)
    assert run.load_type == "closed_loop"
    assert run.concurrency_limit == 4
    assert run.e2e_mean_s == pytest.approx(result["mean_e2el_ms"] / 1e3)
    assert run.tpot_p99_s == pytest.approx(result["p99_tpot_ms"] / 1e3)
    assert len(requests) == result["num_prompts"]
    engine = ["--engine", "gpu=H100", "--engine", "model=llama-3.1-8b", "--workers", "1"]
    outcome = CliRunner().invoke(main, ["calibrate", "validate", str(path), *engine])
    assert outcome.exit_code == 0, outcome.output
    assert "1 run predicted by roofline" in outcome.output


def test_guidellm_benchmarks_become_one_run_each(tmp_path: Path) -> None:
    def benchmark(**strategy: Any) -> dict[str, Any]:
        return {"config": {"strategy": strategy}, "requests": {"successful": [GUIDELLM_REQUEST] * 3}}

    path = tmp_path / "benchmarks.json"
    given = [benchmark(type_="synchronous"), benchmark(type_="concurrent", streams=8), benchmark(type_="poisson")]
    path.write_text(json.dumps({"benchmarks": given}))
    runs = [run for run, _ in read_bench_results(path, ENGINE)]
    assert [run.concurrency_limit for run in runs] == [1, 8, None]
    assert [run.stage for run in runs] == [0, 1, 2]
    # 200 ms over ten tokens after the first: vLLM's TPOT, not GuideLLM's, which counts the first one.
    assert runs[0].tpot_mean_s == pytest.approx(0.020)


def test_aiperf_records_become_a_run(tmp_path: Path) -> None:
    warm_up = AIPERF_RECORD | {"metadata": {"request_start_ns": 1, "benchmark_phase": "warmup"}}
    path = tmp_path / "profile_export.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in (warm_up, AIPERF_RECORD)) + "\n")
    ((run, requests),) = read_bench_results(path, ENGINE)
    assert run.n_requests == 1
    assert run.load_type == "open_loop"
    assert (run.ttft_mean_s, run.e2e_mean_s, run.tpot_mean_s) == pytest.approx((0.05, 0.25, 0.02))
    assert requests.arrival_s.tolist() == [0.0]


@pytest.mark.parametrize("text", ["{", "{}", '{"benchmarks": [{}]}', '{"benchmarks": 3}', "[1]"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(TableError, match=r"result\.json"):
        read_bench_results(path, ENGINE)
