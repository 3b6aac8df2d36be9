"""Tables of measured runs: one row per (experiment, load stage), and one row per request where a run recorded them.

The columns are those of the shared ``serving_runs.csv`` and ``requests.csv.gz``: seconds, tokens, requests and tokens
per second throughout; an empty cell means not measured or not published.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.tables.csv_table import TableError, cell_mistake, number_cell, parsed_cell, table_rows

METRICS = (
    *(f"{latency}_{part}" for latency in ("ttft", "tpot", "e2e", "itl") for part in ("mean", "p50", "p90", "p99")),
    "output_throughput",
)
"""Figures a prediction is held to: latencies in seconds and ``output_throughput`` in tokens per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One load stage of one measured server; ``None`` and NaN where the source does not say.

    Attributes:
        run_id: unique; ``exp`` groups the stages of one server run.
        stage: 0 for the first load on a fresh server.
        params_b: billions of parameters.
        arch: ``dense`` or ``moe``.
        tp: tensor-parallel size; ``dp`` data-parallel size.
        gpu_mem_util: ``gpu_memory_utilization``, a share.
        kv_blocks: as the engine reports them, its null block included.
        load_type: ``open_loop``, ``closed_loop``, ``saturated_closed_loop``, ``burst``, or ``static_batch``
            (requests that start and end together, without a server).
        kv_dtype: of the KV cache; empty: that of the model.
        concurrency_limit: users of a closed loop.
        concurrency_mean: time average of requests in flight.
        shared_prefix_tokens: prompt tokens that all requests were configured to share.
        flag: semicolon list of what makes the run doubtful; empty when clean.
    """

    run_id: str
    exp: str
    stage: int
    engine: str
    engine_version: str
    model: str
    quantization: str
    gpu: str
    tp: int
    load_type: str
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    gpu_mem_util: float = nan
    chunked_prefill: bool | None = None
    prefix_caching: bool | None = None
    kv_blocks: int | None = None
    block_size: int | None = None
    cpu_kv_offload: bool | None = None
    dp: int = 1
    n_gpus: int | None = None
    dtype: str = ""
    arch: str = ""
    params_b: float = nan
    workload: str = ""
    arrival: str = ""
    rate_rps: float = nan
    concurrency_limit: int | None = None
    concurrency_mean: float = nan
    n_requests: int | None = None
    n_success: int | None = None
    n_fail: int | None = None
    send_duration_s: float = nan
    duration_s: float = nan
    prompt_tokens_mean: float = nan
    prompt_tokens_std: float = nan
    output_tokens_mean: float = nan
    output_tokens_std: float = nan
    output_tokens_reported_mean: float = nan
    shared_prefix_tokens: int | None = None
    prefix_note: str = ""
    ttft_mean_s: float = nan
    ttft_p50_s: float = nan
    ttft_p90_s: float = nan
    ttft_p99_s: float = nan
    tpot_mean_s: float = nan
    tpot_p50_s: float = nan
    tpot_p90_s: float = nan
    tpot_p99_s: float = nan
    e2e_mean_s: float = nan
    e2e_p50_s: float = nan
    e2e_p90_s: float = nan
    e2e_p99_s: float = nan
    itl_mean_s: float = nan
    itl_p50_s: float = nan
    itl_p90_s: float = nan
    itl_p95_s: float = nan
    itl_p99_s: float = nan
    output_tokens_per_s: float = nan
    requests_per_s: float = nan
    flag: str = ""
    notes: str = ""
    kv_dtype: str = ""
    source_repo: str = ""
    source_path: str = ""
    source_commit: str = ""
    source_license: str = ""

    def measured(self) -> dict[str, float]:
        """Return the measured figures by the names of ``METRICS``; what was not measured is left out."""
        figures = {name: float(getattr(self, f"{name}_s")) for name in METRICS if name != "output_throughput"}
        figures["output_throughput"] = self.output_tokens_per_s
        return {name: value for name, value in figures.items() if isfinite(value)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRequests:
    """The requests of one run in order of arrival; arrays of equal length.

    Attributes:
        arrival_s: seconds, from any origin.
        prompt_tokens: 0 where unknown (a request that timed out).
        output_tokens: truly generated, or asked for where the request timed out.
        ttft_s: NaN where it timed out.
        e2e_s: until the last token, or until it timed out.
        engine_queue_s: time in the engine's waiting queue; NaN unless the times were taken inside the engine.
        completed: whether the answer arrived.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    ttft_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    engine_queue_s: NDArray[np.float64]
    completed: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_s)


_RENAMED = {
    "in_len_mean": "prompt_tokens_mean",
    "in_len_std": "prompt_tokens_std",
    "out_len_mean": "output_tokens_mean",
    "out_len_std": "output_tokens_std",
    "out_len_reported_mean": "output_tokens_reported_mean",
    "shared_prefix_len": "shared_prefix_tokens",
    "out_tok_s": "output_tokens_per_s",
    "req_s": "requests_per_s",
}
_LATENCIES = tuple(f"{name}_s" for name in (*METRICS, "itl_p95") if name != "output_throughput")
_REQUIRED = ("run_id", "exp", "stage", "engine", "engine_version", "model", "quantization", "gpu", "tp", "load_type")
_LOAD_TYPES = ("open_loop", "closed_loop", "saturated_closed_loop", "burst")
_REQUEST_REQUIRED = ("run_id", "arrival_s", "in_tok", "out_tok", "ttft_s", "e2e_s")


def _column_of(field: str) -> str:
    if field in _LATENCIES:
        return field.removesuffix("_s")
    return next((column for column, renamed in _RENAMED.items() if renamed == field), field)


def read_measured_runs(path: Path) -> list[MeasuredRun]:
    """Read a table of runs (CSV, also gzipped), one per row; columns it does not know are passed over.

    Raises:
        TableError: the file cannot be read, lacks a required column, or a cell is not what its column holds.
    """
    parsers = {field.name: (_column_of(field.name), _parser(field.type)) for field in fields(MeasuredRun)}
    runs: list[MeasuredRun] = []
    lines: dict[str, int] = {}
    for line, row in table_rows(path, _REQUIRED):
        values: dict[str, Any] = {}
        for name, (column, parse) in parsers.items():
            cell = row.get(column, "").strip()
            if cell:
                values[name] = parsed_cell(path, line, column, cell, parse)
            elif column in _REQUIRED:
                raise cell_mistake(path, line, column, cell, "a value: every run needs one")
        run = MeasuredRun(**values)
        _check(path, line, run)
        if run.run_id in lines:
            raise cell_mistake(
                path, line, "run_id", run.run_id, f"unique names, but line {lines[run.run_id]} has it too"
            )
        lines[run.run_id] = line
        runs.append(run)
    return runs


def run_of_settings(settings: Iterable[str]) -> MeasuredRun:
    """Return a run with fields from ``COLUMN=VALUE`` texts, columns as in the table of runs; the rest is empty.

    Raises:
        TableError: a text without ``=``, an unknown column, or a value that is not what the column holds.
    """
    by_column = {_column_of(field.name): field for field in fields(MeasuredRun)}
    values: dict[str, Any] = dict.fromkeys(("run_id", "exp", "engine", "engine_version", "model", "load_type"), "")
    values |= {"stage": 0, "tp": 1, "quantization": "none"}
    for setting in settings:
        column, equals, cell = setting.partition("=")
        if not equals or column not in by_column:
            raise TableError(f"{setting!r}: expected COLUMN=VALUE with a column of the table of runs")
        try:
            values[by_column[column].name] = _parser(by_column[column].type)(cell)
        except ValueError as error:
            raise TableError(f"{setting!r}: expected {error}") from None
    if not values.get("gpu"):
        raise TableError("the GPU is not known; give gpu=NAME")
    return MeasuredRun(**values)


def read_measured_requests(path: Path) -> dict[str, MeasuredRequests]:
    """Read a table of requests (CSV, also gzipped) into one entry per run, each in order of arrival.

    Raises:
        TableError: as ``read_measured_runs``.
    """
    columns: dict[str, list[tuple[float, ...]]] = {}
    for line, row in table_rows(path, _REQUEST_REQUIRED):
        if not row["run_id"]:
            raise cell_mistake(path, line, "run_id", "", "a value: every request belongs to a run")
        columns.setdefault(row["run_id"], []).append(
            (
                number_cell(path, line, row, "arrival_s", required=True),
                number_cell(path, line, row, "in_tok", required=True),
                number_cell(path, line, row, "out_tok", required=True),
                number_cell(path, line, row, "ttft_s"),
                number_cell(path, line, row, "e2e_s"),
                number_cell(path, line, row, "engine_queue_s"),
                # Without a column ``ok`` a request is taken as completed when it has a first token.
                number_cell(path, line, row, "ok") if row.get("ok") else float(bool(row["ttft_s"])),
            )
        )
    found = {}
    for run_id, rows in columns.items():
        table = np.array(rows, dtype=np.float64)
        arrival_s, prompt, output, ttft_s, e2e_s, queue_s, ok = table[np.argsort(table[:, 0], kind="stable")].T
        found[run_id] = MeasuredRequests(
            arrival_s=arrival_s,
            prompt_tokens=prompt.astype(np.int64),
            output_tokens=output.astype(np.int64),
            ttft_s=ttft_s,
            e2e_s=e2e_s,
            engine_queue_s=queue_s,
            completed=ok != 0,
        )
    return found


# --------------------------------------------------------------------------------------------------------- cells


def _check(path: Path, line: int, run: MeasuredRun) -> None:
    if run.load_type not in _LOAD_TYPES:
        raise cell_mistake(path, line, "load_type", run.load_type, f"one of {', '.join(_LOAD_TYPES)}")
    for column, value in (("tp", run.tp), ("dp", run.dp), ("max_num_seqs", run.max_num_seqs)):
        if value is not None and value < 1:
            raise cell_mistake(path, line, column, str(value), "a whole number >= 1")


def _parser(annotation: Any) -> Callable[[str], Any]:
    if annotation in (int, int | None):
        return _whole
    if annotation is float:
        return _real
    return _truth if annotation == bool | None else str


def _whole(cell: str) -> int:
    value = _real(cell, expected="a whole number >= 0")
    if value != int(value):
        raise ValueError("a whole number >= 0")
    return int(value)


def _real(cell: str, expected: str = "a number >= 0") -> float:
    try:
        value = float(cell)
    except ValueError:
        value = nan
    if not (isfinite(value) and value >= 0):
        raise ValueError(expected)
    return value


def _truth(cell: str) -> bool:
    if cell not in ("True", "False"):
        raise ValueError("True or False")
    return cell == "True"
