"""Tables of operator times: matrix products, attention and all-reduces measured one by one.

The columns are those of the shared ``op_times.csv.gz``. They set the kernel efficiencies that a fit corrects.
"""

from math import isnan
from pathlib import Path

import pandas as pd

from calibrate.fit import kernel_factors
from calibrate.fit.kernel_factors import Factor
from calibrate.tables.csv_table import TableError, cell_mistake, number_cell, table_rows
from sim.catalogue import UnknownNameError, find_gpu
from sim.factors import Factors, packaged_factors

NEEDED = {
    "gemm": ("m_tokens", "n", "k"),
    "attn_decode": ("batch", "kv_len", "n_q_heads", "n_kv_heads", "head_dim"),
    "attn_prefill": ("batch", "q_len", "kv_len", "n_q_heads", "n_kv_heads", "head_dim"),
    "all_reduce": ("tp", "bytes"),
}
"""Operators that a fit uses, and the cells each needs; rows of others are passed over."""

_REQUIRED = ("gpu", "op", "dtype", "kv_dtype", "kernel", "source", "time_us")
_NUMBERS = ("tp", "m_tokens", "n", "k", "batch", "q_len", "kv_len", "n_q_heads", "n_kv_heads", "head_dim", "bytes")


def read_operators(path: Path) -> pd.DataFrame:
    """Read the rows of operators that a fit uses (CSV, also gzipped), one per measured kernel.

    Raises:
        TableError: the file cannot be read, lacks a required column, a cell is not what its column holds, or no
            row is of such an operator.
    """
    rows: list[dict[str, object]] = []
    for line, row in table_rows(path, (*_REQUIRED, *_NUMBERS)):
        needed = NEEDED.get(row["op"])
        if needed is None:
            continue
        if not row["gpu"]:
            raise cell_mistake(path, line, "gpu", "", "the GPU that was measured")
        found: dict[str, object] = {name: row[name] or None for name in _REQUIRED[:-1]}
        for name in (*_NUMBERS, "time_us"):
            value = number_cell(path, line, row, name)
            if (name in needed or name == "time_us") and (isnan(value) or value <= 0):
                raise cell_mistake(path, line, name, row[name], f"a number > 0, which {row['op']} needs")
            found[name] = value
        rows.append(found)
    if not rows:
        raise TableError(f"{path}: no row of {', '.join(NEEDED)}: nothing to set kernel efficiencies by")
    table = pd.DataFrame(rows)
    for name in ("kernel", "kv_dtype"):
        table[name] = table[name].astype("string")
    return table


def operator_factors(ops: pd.DataFrame) -> Factors:
    """Return the packaged efficiencies with those replaced that these operators tell of.

    Rows of GPUs that the catalogue lacks say nothing, but for all-reduces that ``kernel_factors`` knows.
    """
    known = ops[ops["gpu"].map(_is_known) | ops["op"].eq("all_reduce")]
    found: list[Factor] = []
    if known["op"].eq("gemm").any():
        found += kernel_factors.gemm_factors(known)
    if known["op"].str.startswith("attn").any():
        found += kernel_factors.attention_factors(known)
    if known["op"].eq("all_reduce").any():
        found += kernel_factors.all_reduce_factors(known)
    # As many digits as the packaged ones have, so that the same table gives the same efficiencies.
    return packaged_factors().replaced({factor.name: float(f"{factor.value:.4g}") for factor in found})


def _is_known(gpu: str) -> bool:
    try:
        find_gpu(gpu)
    except UnknownNameError:
        return False
    return True
