"""Results as files and as JSON. Equal inputs give equal bytes; a file appears under its name only when complete."""

import csv
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from sim.chrome_trace import TracedIteration, chrome_trace
from sim.metrics import Row, load_columns
from sim.result import Measured, Result, request_frame
from sim.summary import summary_columns
from sim.vllm_result import vllm_result

FORMATS = ("csv", "parquet", "png", "svg", "vllm")
DEFAULT_FORMATS = ("csv", "parquet", "png", "svg")


def write_result(result: Result, folder: Path, formats: Collection[str] = DEFAULT_FORMATS) -> list[Path]:
    """Write a result into ``folder``, which is made when missing, and return the paths written.

    Always ``fleet.resolved.yaml``; with ``csv`` ``summary.csv``; with ``parquet`` ``requests.parquet``; with ``png``
    and ``svg`` the pictures of ``sim.plots``; with ``vllm`` a file per fleet, load and replication in ``vllm/``.

    Raises:
        ValueError: for a name that is not in FORMATS.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise ValueError(f"formats must be among {', '.join(FORMATS)}; got {', '.join(unknown)}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "fleet.resolved.yaml"]
    _write_text(paths[0], resolved_yaml(result))
    if "csv" in formats:
        paths.append(folder / "summary.csv")
        _write_csv(paths[-1], result.summary_rows)
    if "parquet" in formats:
        paths.append(folder / "requests.parquet")
        _write_parquet(paths[-1], result)
    if "vllm" in formats:
        (folder / "vllm").mkdir(exist_ok=True)
        labels = _file_labels(result)
        for run in result.runs:
            name = _vllm_name(labels[run.fleet], run.load_kind, run.load, run.replication)
            paths.append(folder / "vllm" / name)
            _write_text(
                paths[-1], _strict_json(vllm_result(run, result.fleets[run.fleet], result.file, result.measured))
            )
    pictures = [form for form in ("png", "svg") if form in formats]
    if pictures and result.runs:
        paths += _write_pictures(folder, result, pictures)
    return paths


def write_chrome_trace(iterations: Iterable[TracedIteration], replica: str, folder: Path) -> Path:
    """Write one replica's iterations as ``trace.json`` for Perfetto and return its path."""
    path = folder / "trace.json"
    _write_text(path, chrome_trace(iterations, replica))
    return path


def result_json(result: Result) -> str:
    """Return the figures as strict JSON for programs: provenance, notes, and the summary rows with null for NaN."""
    return _strict_json(
        {
            "name": result.file.name,
            "version": result.version,
            "seed": result.file.run.seed,
            "interrupted": result.interrupted,
            "measured": None if result.measured is None else _measured(result, result.measured),
            "notes": result.notes,
            "slo": None if result.file.slo is None else result.file.slo.model_dump(mode="json"),
            "fleets": resolved_fleets(result),
            "summary": result.summary_rows,
        }
    )


def _measured(result: Result, measured: Measured) -> dict[str, Any]:
    """Where a real run took place, and what each run found when it checked itself and its load client."""
    runs = [
        {"fleet": run.fleet, **load_columns(run), "replication": run.replication, "checks": run.checks}
        for run in result.runs
    ]
    return {**asdict(measured), "runs": runs}


def resolved_fleets(result: Result) -> dict[str, Any]:
    """Return what each expert ran with once every default was resolved, and where its times come from."""
    measured = result.measured
    return {
        name: {
            expert.name: {
                "model": expert.model,
                "quantization": expert.quantization,
                "gpu": expert.gpu,
                "tensor_parallel_size": expert.tensor_parallel_size,
                "replicas": expert.replicas,
                "gpus": expert.gpus,
                "price_per_hour": expert.price_per_hour,
                "engine": asdict(expert.engine),
                "front_end": asdict(expert.front_end),
                **(
                    {"curve": asdict(expert.curve.source)}
                    if measured is None
                    else {"measured_on": measured.engines[name][expert.name]}
                ),
            }
            for expert in fleet.experts
        }
        for name, fleet in result.fleets.items()
    }


def resolved_yaml(result: Result) -> str:
    """Return the fleet file with every default filled in, itself a fleet file; the resolved engines are comments."""
    settings = yaml.safe_dump(resolved_fleets(result), sort_keys=False, allow_unicode=True, width=120)
    spec = yaml.safe_dump(result.file.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    head = [f"expert-router {result.version}, seed {result.file.run.seed}; every default filled in."]
    if result.measured is not None:
        head.append(f"Measured, from {result.measured.started} on, at {', '.join(result.measured.urls.values())}.")
    if result.interrupted:
        head.append("It was interrupted: some loads or replications are missing from the results.")
    head += ["", "What each engine ran with:", *settings.splitlines()]
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + "\n" + spec


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends well and vanishes when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _write_csv(path: Path, rows: list[Row]) -> None:
    with _replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(summary_columns())
        writer.writerows([_csv_cell(row[name]) for name in summary_columns()] for row in rows)


def _csv_cell(value: Any) -> Any:
    """Ten significant digits are more than any figure is worth and hide rounding; unknown is an empty cell."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return value


def _write_parquet(path: Path, result: Result) -> None:
    """One row group per run, so that memory holds one run's table at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Every name has 32-bit codes, whatever the number of names in a run, so that all row groups share a schema.
    schema = pa.schema(
        [
            field.with_type(pa.dictionary(pa.int32(), pa.string())) if pa.types.is_dictionary(field.type) else field
            for field in pa.Schema.from_pandas(request_frame([]), preserve_index=False)
        ]
    )
    with _replacing(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for run in result.runs:
            writer.write_table(pa.Table.from_pandas(request_frame([run]), schema=schema, preserve_index=False))


def _write_pictures(folder: Path, result: Result, forms: list[str]) -> list[Path]:
    from sim.plots import pictures, save_picture

    paths = []
    for name, figure in pictures(result).items():
        for form in forms:
            paths.append(folder / f"{name}.{form}")
            with _replacing(paths[-1]) as partial:
                save_picture(figure, partial, form)
    return paths


def _file_labels(result: Result) -> dict[str, str]:
    """Return a file name's part for each fleet: characters that file systems dislike replaced, never two alike."""
    labels: dict[str, str] = {}
    for fleet in result.fleets:
        label = plain = re.sub(r"[^A-Za-z0-9._-]+", "_", fleet)
        number = 2
        while label in labels.values():
            label, number = f"{plain}-{number}", number + 1
        labels[fleet] = label
    return labels


def _vllm_name(fleet_label: str, load_kind: str, load: float, replication: int) -> str:
    """``{fleet}-{load}-r{replication}.json``."""
    load_label = {"closed_loop": f"concurrency{load:g}", "open_loop": f"{load:g}qps"}.get(load_kind, load_kind)
    return f"{fleet_label}-{load_label}-r{replication}.json"


def _strict_json(value: Any) -> str:
    return json.dumps(_nulls_for_nan(value), allow_nan=False, indent=1) + "\n"


def _nulls_for_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity; both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _nulls_for_nan(each) for name, each in value.items()}
    return [_nulls_for_nan(each) for each in value] if isinstance(value, list | tuple) else value
