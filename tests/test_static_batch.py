from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibrate.fit.fit import fit
from calibrate.fit.held_out import quantization_errors
from calibrate.fit.observations import observe
from calibrate.fit.parameters import ASYNCHRONOUS, CORRECTIONS, OVERHEADS, V0, group_of_version, overhead_columns
from calibrate.tables.csv_table import TableError
from calibrate.tables.measured_runs import MeasuredRun
from calibrate.tables.static_batch import read_static_batches
from tests.measured_tables import write_table
from tests.synthetic_runs import TRUTH, by_linear_model, loads

ROW: dict[str, object] = {
    "run_id": "ours/a/b16",
    "engine": "vLLM",
    "engine_version": "2024 (V0; version not stated)",
    "model": "llama-3-8b",
    "weight_dtype": "fp16",
    "kv_dtype": "fp16",
    "gpu": "H100-80GB",
    "tp": 1,
    "batch_size": 16,
    "in_len": 512,
    "out_len": 256,
    "batch_latency_s": 3.5,
    "colour": "unknown columns are passed over",
}


def table(folder: Path, *rows: dict[str, object]) -> Path:
    return write_table(folder / "static.csv", [ROW | row for row in rows])


def test_a_row_is_a_run_without_a_server(tmp_path: Path) -> None:
    (run,) = read_static_batches(table(tmp_path, {}))
    assert run.load_type == "static_batch"
    assert (run.concurrency_mean, run.prompt_tokens_mean, run.output_tokens_mean) == (16, 512, 256)
    assert (run.e2e_mean_s, run.quantization, run.kv_dtype) == (3.5, "bf16", "")
    seen = observe(run)
    assert not isinstance(seen, str)
    assert seen.group is V0
    assert seen.measured_s == 3.5 / 256
    assert (seen.decodes, seen.kv_tokens) == (16, 16 * (512 + 128))


def test_longer_prompts_and_larger_batches_take_more_of_every_kernel(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"in_len": 512}, {"in_len": 2048}, {"batch_size": 64}]
    small, long, large = (observe(run) for run in read_static_batches(table(tmp_path, *rows)))
    assert not isinstance(small, str)
    for more in (long, large):
        assert not isinstance(more, str)
        assert (more.terms >= small.terms).all()
        assert more.terms[CORRECTIONS.index("prefill_attention")] > small.terms[CORRECTIONS.index("prefill_attention")]


def test_fp8_weights_take_less_of_the_matrix_products_and_fp8_kv_less_reading(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{}, {"weight_dtype": "fp8"}, {"kv_dtype": "fp8"}]
    plain, weights, kv = (observe(run) for run in read_static_batches(table(tmp_path, *rows)))
    assert not isinstance(plain, str)
    assert not isinstance(weights, str)
    assert not isinstance(kv, str)
    matrix, reading = CORRECTIONS.index("matrix"), CORRECTIONS.index("kv_read")
    assert weights.terms[matrix] < 0.7 * plain.terms[matrix]
    assert kv.terms[reading] < 0.7 * plain.terms[reading]


def synthetic(tmp_path: Path, truth: dict[str, float]) -> list[MeasuredRun]:
    """Return batches of V0 engines whose times are those of the truth."""
    models = (("llama-3-8b", 1), ("llama-3-8b", 2), ("llama-2-7b", 1), ("llama-2-7b", 4), ("llama-3-70b", 4))
    rows = [
        {"run_id": f"ours/{model}/{size}/{batch}/{length}", "model": model, "tp": size, "weight_dtype": weights}
        | {"batch_size": batch, "in_len": length, "out_len": length}
        for model, size in models
        for weights in (("fp16", "fp8") if (model, size) == ("llama-3-8b", 1) else ("fp16",))
        for batch in (1, 16, 64)
        for length in (128, 1024)
    ]
    made = []
    for run in read_static_batches(table(tmp_path, *rows)):
        seen = observe(run)
        assert not isinstance(seen, str)
        values = np.zeros(len(seen.terms))
        values[: len(CORRECTIONS)] = [truth[name] for name in CORRECTIONS]
        values[overhead_columns(V0)] = [truth[name] for name in OVERHEADS]
        made.append(replace(run, e2e_mean_s=float(seen.terms @ values) * run.output_tokens_mean))
    return made


def test_old_engines_are_fitted_apart_and_recovered(tmp_path: Path) -> None:
    truth = TRUTH | {"matrix": 0.9, "kv_read": 1.1, "prefill_attention": 1.0, "filter_fixed_s": 0.0}
    batches = synthetic(tmp_path, truth)
    served = [by_linear_model(load) for load in loads()]
    both = fit([*served, *batches], resamples=0)
    assert both.parameters().tolist() == fit(served, resamples=0).parameters().tolist()
    assert both.left_out == {"vLLM before 0.8 (V0 engine), other kernels: fitted apart": len(batches)}
    assert list(both.overheads) == [ASYNCHRONOUS]
    old = fit([*served, *batches], resamples=0, kernels="V0")
    assert list(old.overheads) == [V0]
    assert np.abs(old.errors).max() < 0.01
    assert old.corrections["matrix"].value == pytest.approx(0.9, rel=0.05)


def test_a_quantization_is_predicted_by_a_fit_that_has_not_seen_it(tmp_path: Path) -> None:
    batches = synthetic(tmp_path, TRUTH)
    slower = [replace(run, e2e_mean_s=1.25 * run.e2e_mean_s) if run.quantization == "fp8" else run for run in batches]
    errors = quantization_errors(slower, V0, "fp8")
    assert len(errors) == 6
    assert {seen.run.quantization for seen, _ in errors} == {"fp8"}
    assert [error for _, error in errors] == pytest.approx([-0.2] * 6, abs=0.03)


@pytest.mark.parametrize(("text", "is_v0"), [("0.5.4", True), ("vLLM 0.8.1", False), ("2024 (V0)", True), ("", False)])
def test_v0_is_what_came_before_0_8_or_says_so(text: str, is_v0: bool) -> None:
    assert (group_of_version(text) is V0) == is_v0


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"batch_latency_s": "soon"}, "line 3: column 'batch_latency_s': got 'soon', expected a number >= 0"),
        ({"batch_latency_s": 0}, "line 3: column 'batch_latency_s': got '0', expected a number > 0"),
        ({"batch_size": 1.5}, "line 3: column 'batch_size': got '1.5', expected a whole number >= 1"),
        ({"in_len": ""}, "line 3: column 'in_len': got '', expected a number >= 0"),
        ({"gpu": ""}, "line 3: column 'gpu': got '', expected a value"),
    ],
)
def test_a_broken_cell_names_file_line_and_column(tmp_path: Path, cell: dict[str, object], message: str) -> None:
    with pytest.raises(TableError) as caught:
        read_static_batches(table(tmp_path, {}, cell))
    assert str(caught.value).startswith(f"{tmp_path / 'static.csv'}: {message}")


def test_a_truncated_table_names_line_and_column(tmp_path: Path) -> None:
    path = table(tmp_path, {}, {})
    path.write_text(path.read_text(encoding="utf-8")[:-60], encoding="utf-8")
    with pytest.raises(TableError, match=r"static\.csv: line 3: column '\w+': the row ends after"):
        read_static_batches(path)
    path.write_text("run_id,model\n", encoding="utf-8")
    with pytest.raises(TableError, match="line 1: columns missing: engine, engine_version, weight_dtype"):
        read_static_batches(path)
