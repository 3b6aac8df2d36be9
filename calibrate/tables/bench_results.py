"""Result files of load generators as measured runs: ``vllm bench serve``, GuideLLM and AIPerf.

``vllm bench serve --save-detailed`` is read by the keys of ``vllm/benchmarks/serve.py`` (vLLM 0.33); tests read files
of vLLM 0.32, and what ``expert-router simulate --format vllm`` writes with the same keys. GuideLLM's
``benchmarks.json`` and AIPerf's ``profile_export.jsonl`` are read by their documentation (GuideLLM at ee7a774, AIPerf
of October 2025) and have not been tried on files of those programs.

A result says what was sent and how long it took, not what served it: the caller gives the engine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.tables.csv_table import TableError
from calibrate.tables.measured_runs import METRICS, MeasuredRequests, MeasuredRun
from sim.metrics import distribution

SUFFIXES = (".json", ".jsonl")


def read_bench_results(path: Path, engine: MeasuredRun) -> list[tuple[MeasuredRun, MeasuredRequests]]:
    """Return the runs of a result file with their requests; GuideLLM files may hold several.

    Args:
        path: the format is told by its contents.
        engine: fields of the engine; the load and the figures are replaced, and an empty ``model`` is the file's.

    Raises:
        TableError: the file cannot be read or is none of the formats.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise TableError(f"{path}: cannot be read: {reason}") from error
    try:
        if path.suffix == ".jsonl":
            return [_aiperf(path, [json.loads(line) for line in text.splitlines() if line.strip()], engine)]
        result = json.loads(text)
        if "benchmarks" in result:
            return [_guidellm(path, i, each, engine) for i, each in enumerate(result["benchmarks"])]
        return [_vllm(path, result, engine)]
    except json.JSONDecodeError as error:
        raise TableError(f"{path}: line {error.lineno}: not JSON: {error.msg}; is the file truncated?") from error
    except KeyError as error:
        raise TableError(
            f"{path}: key {error} is missing; expected a result of vllm bench serve --save-detailed, GuideLLM's "
            "benchmarks.json or AIPerf's profile_export.jsonl"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise TableError(f"{path}: not as its format says: {error}") from error


def _vllm(path: Path, result: Mapping[str, Any], engine: MeasuredRun) -> tuple[MeasuredRun, MeasuredRequests]:
    failed = np.array([bool(error) for error in result["errors"]])
    requests = _requests(
        sent_s=result["start_times"],
        prompt_tokens=result["input_lens"],
        output_tokens=result["output_lens"],
        ttft_s=np.where(failed, nan, np.array(result["ttfts"], float)),
        e2e_s=result["latencies"],
        completed=~failed,
    )
    users = result.get("max_concurrency")
    closed = users is not None and result.get("request_rate") in ("inf", inf, None)
    gaps_s = [gap for gaps in result.get("itls", []) for gap in gaps]
    run = _run(path.stem, 0, engine, requests, gaps_s, users=users if closed else None)
    model = engine.model or result["model_id"]
    return replace(run, model=model, duration_s=result["duration"], output_tokens_per_s=result["output_throughput"]), (
        requests
    )


def _guidellm(
    path: Path, index: int, benchmark: Mapping[str, Any], engine: MeasuredRun
) -> tuple[MeasuredRun, MeasuredRequests]:
    successful = benchmark["requests"]["successful"]
    requests = _requests(
        sent_s=[request["request_start_time"] for request in successful],
        prompt_tokens=[request["prompt_tokens"] for request in successful],
        output_tokens=[request["output_tokens"] for request in successful],
        ttft_s=[request["time_to_first_token_ms"] / 1e3 for request in successful],
        e2e_s=[request["request_latency"] for request in successful],
        completed=np.ones(len(successful), bool),
    )
    strategy = benchmark["config"]["strategy"]
    kind = strategy["type_"]
    users = 1 if kind == "synchronous" else strategy["streams"] if kind == "concurrent" else None
    return _run(path.stem, index, engine, requests, [], users=users), requests


def _aiperf(
    path: Path, records: Sequence[Mapping[str, Any]], engine: MeasuredRun
) -> tuple[MeasuredRun, MeasuredRequests]:
    measured = [record for record in records if record["metadata"].get("benchmark_phase", "profiling") == "profiling"]
    completed = np.array([not record.get("error") for record in measured])

    def values(name: str, scale: float = 1.0) -> list[float]:
        return [
            record["metrics"][name]["value"] * scale if done else 0.0
            for record, done in zip(measured, completed, strict=True)
        ]

    requests = _requests(
        sent_s=[record["metadata"]["request_start_ns"] * 1e-9 for record in measured],
        prompt_tokens=values("input_sequence_length"),
        output_tokens=values("output_sequence_length"),
        ttft_s=np.where(completed, values("time_to_first_token", 1e-3), nan),
        e2e_s=values("request_latency", 1e-3),
        completed=completed,
    )
    return _run(path.stem, 0, engine, requests, [], users=engine.concurrency_limit), requests


def _requests(
    *, sent_s: Any, prompt_tokens: Any, output_tokens: Any, ttft_s: Any, e2e_s: Any, completed: Any
) -> MeasuredRequests:
    sent = np.array(sent_s, dtype=np.float64)
    if not len(sent):
        raise ValueError("no request in it")
    order = np.argsort(sent, kind="stable")
    columns = [np.array(column, dtype=np.float64)[order] for column in (prompt_tokens, output_tokens, ttft_s, e2e_s)]
    return MeasuredRequests(
        arrival_s=sent[order] - sent.min(),
        prompt_tokens=columns[0].astype(np.int64),
        output_tokens=columns[1].astype(np.int64),
        ttft_s=columns[2],
        e2e_s=columns[3],
        engine_queue_s=np.full(len(sent), nan),
        completed=np.asarray(completed, bool)[order],
    )


def _run(
    name: str,
    stage: int,
    engine: MeasuredRun,
    requests: MeasuredRequests,
    gaps_s: Sequence[float],
    *,
    users: int | None,
) -> MeasuredRun:
    """Return the run with its figures by vLLM's definitions, whatever the program calls them."""
    done = requests.completed
    ttft_s, e2e_s, output = requests.ttft_s[done], requests.e2e_s[done], requests.output_tokens[done]
    several = output > 1
    tpot_s = (e2e_s - ttft_s)[several] / (output[several] - 1)
    samples = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s, "itl": np.array(gaps_s, dtype=np.float64)}
    figures: dict[str, Any] = {}
    for latency, values in samples.items():
        spread = distribution(values)
        parts = {"mean": spread.mean, "p50": spread.median, "p90": spread.p90, "p99": spread.p99}
        figures |= {f"{latency}_{part}_s": value for part, value in parts.items()}
    assert figures.keys() == {f"{metric}_s" for metric in METRICS[:-1]}
    duration_s = float((requests.arrival_s + requests.e2e_s)[done].max()) if done.any() else nan
    return replace(
        engine,
        run_id=f"{name}/{stage}",
        exp=name,
        stage=stage,
        load_type="open_loop" if users is None else "closed_loop",
        concurrency_limit=users,
        n_requests=len(requests),
        n_success=int(done.sum()),
        duration_s=duration_s,
        prompt_tokens_mean=float(requests.prompt_tokens[done].mean()) if done.any() else nan,
        output_tokens_mean=float(output.mean()) if done.any() else nan,
        output_tokens_per_s=float(output.sum()) / duration_s,
        **figures,
    )
