"""Tables of static batches: requests of one length that start together and run to their end, without a server.

The columns are those of the shared ``static_batch_runs.csv``. A row becomes a ``MeasuredRun`` of load ``static_batch``;
rows of one model, GPU and precision are one experiment.
"""

from pathlib import Path

from calibrate.tables.csv_table import cell_mistake, number_cell, table_rows
from calibrate.tables.measured_runs import MeasuredRun

REQUIRED = (
    *("run_id", "engine", "engine_version", "model", "weight_dtype", "kv_dtype", "gpu"),
    *("tp", "batch_size", "in_len", "out_len", "batch_latency_s"),
)
_QUANTIZATIONS = {"fp16": "bf16", "bf16": "bf16"}  # alike in bytes and rate; others go by the catalogue's names


def read_static_batches(path: Path) -> list[MeasuredRun]:
    """Read a table of static batches (CSV, also gzipped), one per row; columns it does not know are passed over.

    Raises:
        TableError: the file cannot be read, lacks a required column, or a cell is not what its column holds.
    """
    runs: list[MeasuredRun] = []
    for line, row in table_rows(path, REQUIRED):
        for column in ("run_id", "model", "weight_dtype", "gpu"):
            if not row[column].strip():
                raise cell_mistake(path, line, column, "", "a value: every batch needs one")
        numbers = {name: number_cell(path, line, row, name, required=True) for name in REQUIRED[-5:]}
        for column, value in numbers.items():
            whole = column != "batch_latency_s"
            if value <= 0 or (whole and value != int(value)):
                expected = "a whole number >= 1" if whole else "a number > 0"
                raise cell_mistake(path, line, column, row[column], expected)
        weights, kv = row["weight_dtype"].strip(), row["kv_dtype"].strip()
        runs.append(
            MeasuredRun(
                run_id=row["run_id"],
                exp="/".join((row["model"], row["gpu"], f"tp{int(numbers['tp'])}", f"{weights}-{kv}", "static")),
                stage=0,
                engine=row["engine"],
                engine_version=row["engine_version"],
                model=row["model"],
                quantization=_QUANTIZATIONS.get(weights, weights),
                kv_dtype="fp8" if kv.startswith("fp8") else "",
                gpu=row["gpu"],
                tp=int(numbers["tp"]),
                arch=row.get("arch", "").strip() or "dense",
                load_type="static_batch",
                concurrency_mean=numbers["batch_size"],
                prompt_tokens_mean=numbers["in_len"],
                output_tokens_mean=numbers["out_len"],
                e2e_mean_s=numbers["batch_latency_s"],
                flag=row.get("flag", ""),
                source_repo=row.get("source_repo", ""),
            )
        )
    return runs
