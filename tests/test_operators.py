import gzip
from pathlib import Path

import pytest

from calibrate.fit.operators import operator_factors, read_operators
from calibrate.tables.csv_table import TableError
from sim.factors import GemmFactors, packaged_factors
from tests.measured_tables import write_table

COLUMNS = (
    *("source", "gpu", "tp", "dtype", "kv_dtype", "kernel", "op", "m_tokens", "n", "k"),
    *("batch", "q_len", "kv_len", "n_q_heads", "n_kv_heads", "head_dim", "bytes", "time_us"),
)
TRUTH = GemmFactors(fixed_s=4e-6, bandwidth_efficiency=0.8, rate_efficiency=0.7, overlap_exponent=3.0)


def gemm(tokens: int, outputs: int, inputs: int, gpu: str = "H100-SXM-80GB") -> dict[str, object]:
    moved_bytes = 2 * (outputs * inputs + tokens * (outputs + inputs))
    seconds = TRUTH.gemm_s(moved_bytes / 3350e9, 2 * tokens * outputs * inputs / 989.4e12)
    cells = {"op": "gemm", "gpu": gpu, "dtype": "bfloat16", "m_tokens": tokens, "n": outputs, "k": inputs}
    return dict.fromkeys(COLUMNS, "") | cells | {"time_us": seconds * 1e6}


def table(folder: Path, *more: dict[str, object]) -> Path:
    rows = [
        gemm(tokens, outputs, inputs)
        for tokens in (1, 8, 64, 128, 256, 512, 2048, 8192)
        for outputs, inputs in ((4096, 4096), (14336, 4096), (8192, 8192), (4096, 14336), (10240, 8192))
    ]
    return write_table(folder / "ops.csv", [*rows, *(gemm(1, 4096, 4096) | row for row in more)])


def test_efficiencies_are_those_that_made_the_times_and_the_rest_is_packaged(tmp_path: Path) -> None:
    others: list[dict[str, object]] = [{"op": "rotary_emb", "m_tokens": ""}, {"gpu": "TPU-v9", "time_us": 1}]
    found = operator_factors(read_operators(table(tmp_path, *others))).values()
    packaged = packaged_factors().values()
    changed = {name for name in found if found[name] != packaged[name]}
    assert changed == {f"hopper.gemm_bf16.{name}" for name in ("fixed_s", *GemmFactors.__slots__[1:])}
    assert found["hopper.gemm_bf16.bandwidth_efficiency"] == pytest.approx(0.8, rel=1e-3)
    assert found["hopper.gemm_bf16.fixed_s"] == pytest.approx(4e-6, rel=1e-2)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"time_us": "fast"}, "column 'time_us': got 'fast', expected a number >= 0"),
        ({"time_us": 0}, "column 'time_us': got '0', expected a number > 0, which gemm needs"),
        ({"k": ""}, "column 'k': got '', expected a number > 0, which gemm needs"),
        ({"gpu": ""}, "column 'gpu': got '', expected the GPU that was measured"),
    ],
)
def test_a_broken_cell_names_file_line_and_column(tmp_path: Path, cell: dict[str, object], message: str) -> None:
    with pytest.raises(TableError) as caught:
        read_operators(table(tmp_path, {}, cell))
    assert str(caught.value) == f"{tmp_path / 'ops.csv'}: line 43: {message}"


def test_a_truncated_table_says_so(tmp_path: Path) -> None:
    path = table(tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(TableError, match=r"ops\.csv: line \d+: column '\w+': the row ends after"):
        read_operators(path)
    packed = tmp_path / "ops.csv.gz"
    packed.write_bytes(gzip.compress(text.encode())[:-40])
    with pytest.raises(TableError, match=r"ops\.csv\.gz: after line \d+: the compressed file is broken"):
        read_operators(packed)


def test_a_table_without_such_operators_says_so(tmp_path: Path) -> None:
    path = write_table(tmp_path / "ops.csv", [gemm(1, 1, 1) | {"op": "rotary_emb"}])
    with pytest.raises(TableError, match="no row of gemm, attn_decode"):
        read_operators(path)
