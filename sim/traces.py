"""Readers of what a workload takes from files: traces to replay, and columns of empirical lengths.

| format | fields | time |
| --- | --- | --- |
| ``azure`` | CSV ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Azure LLM inference traces of 2023 and 2024) | dates |
| ``burstgpt`` | CSV, by column name: ``Timestamp`` or ``Timestamp (s)``, ``Request tokens``, ``Response tokens`` | s |
| ``mooncake`` | JSON lines ``timestamp``, ``input_length``, ``output_length`` | ms |
| ``timed_trace`` | the same fields, as vLLM's load generator reads them | s |

The unit of numeric times can be given; the table names the default. A file whose name ends in ``.gz`` is unpacked.
Every mistake is a ``TraceError`` that names file, line and field.
"""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from sim.spec import ClosedLoop, Empirical, Trace, WorkloadSpec
from sim.traffic import MAX_TOKENS, TraceTable, WorkloadData

if TYPE_CHECKING:
    import pandas as pd

TraceFormat = Literal["azure", "burstgpt", "mooncake", "timed_trace"]
TimeUnit = Literal["s", "ms"]

WORDS_PER_TOKEN = 0.75  # a common rule for English; ShareGPT files hold text, and no tokenizer is at hand
SHAREGPT_COLUMNS = ("prompt_tokens", "output_tokens")

_SECONDS = {"s": 1.0, "ms": 1e-3}
_DEFAULT_UNIT: dict[TraceFormat, TimeUnit] = {"burstgpt": "s", "mooncake": "ms", "timed_trace": "s"}


class TraceError(ValueError):
    """A trace or data file cannot be used; the message names file, line and field, and what is expected."""


def read_workload_data(workload: WorkloadSpec) -> WorkloadData:
    """Read every file a workload names, each once.

    Raises:
        TraceError: a file is missing or holds something else than expected.
    """
    notes: list[str] = []
    trace = None
    if isinstance(workload.load, Trace):
        trace = read_trace(workload.load.file, workload.load.format, workload.load.time_unit)
        notes += trace.notes
    wanted: dict[str, set[str]] = defaultdict(set)
    for distribution in _empirical_distributions(workload):
        wanted[distribution.file].add(distribution.column)
    columns = {}
    for file, names in wanted.items():
        if _is_json(file):
            lengths = read_sharegpt_lengths(file)
            notes.append(
                f"{file}: token counts are words / {WORDS_PER_TOKEN:g}, not a tokenizer's; "
                f"{len(lengths['prompt_tokens'])} conversations"
            )
            for name in names:
                if name not in lengths:
                    raise TraceError(_missing_column(file, name, SHAREGPT_COLUMNS))
                columns[file, name] = np.sort(lengths[name])
        else:
            table = _read_csv(file)
            for name in names:
                columns[file, name] = np.sort(_numbers(table, name, file))
    return WorkloadData(trace=trace, columns=columns, notes=tuple(notes))


def _empirical_distributions(workload: WorkloadSpec) -> Iterator[Empirical]:
    """Yield the empirical distributions whose values are drawn; a trace brings its own lengths."""
    used = []
    if not isinstance(workload.load, Trace):
        for spec in workload.classes.values():
            used += [spec.prompt_tokens, spec.output_tokens]
    if isinstance(workload.load, ClosedLoop):
        used.append(workload.load.think_time_s)
    for distribution in used:
        if isinstance(distribution, Empirical):
            yield distribution


def read_trace(path: str | Path, trace_format: TraceFormat, time_unit: TimeUnit | None = None) -> TraceTable:
    """Read a trace; times count from its first request.

    Rows without prompt tokens or without output tokens (BurstGPT's mark of a failed request) are left out and counted
    in the notes.

    Args:
        path: the file; unpacked when its name ends in ``.gz``.
        trace_format: see the table above.
        time_unit: of numeric times; None: the format's own.

    Raises:
        TraceError: no such file, a missing column or field, a bad number, times that go back, no requests, or a
            ``time_unit`` for dates.
    """
    notes = []
    if trace_format == "azure":
        if time_unit is not None:
            raise TraceError(f"{path}: time_unit {time_unit!r} does not apply to azure traces, whose times are dates")
        table = _read_csv(path)
        lines = _lines(table)
        time_field, prompt_field, output_field = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
        time_s = _dates_s(table, time_field, path)
        prompt = _numbers(table, prompt_field, path)
        output = _numbers(table, output_field, path)
    elif trace_format == "burstgpt":
        table = _read_csv(path)
        lines = _lines(table)
        time_field = "Timestamp (s)" if "Timestamp (s)" in table.columns else "Timestamp"
        prompt_field, output_field = "Request tokens", "Response tokens"
        time_s = _numbers(table, time_field, path) * _SECONDS[time_unit or _DEFAULT_UNIT[trace_format]]
        prompt = _numbers(table, prompt_field, path)
        output = _numbers(table, output_field, path)
    else:
        time_field, prompt_field, output_field = fields = ("timestamp", "input_length", "output_length")
        lines, (time_s, prompt, output), has_hashes = _read_json_lines(path, fields)
        time_s = time_s * _SECONDS[time_unit or _DEFAULT_UNIT[trace_format]]
        if has_hashes:
            notes.append(f"{path}: hash_ids are not used; prompts share no prefix beyond shared_prefix_tokens")

    _check_ordered(time_s, lines, path, time_field)
    _check_tokens(prompt, lines, path, prompt_field)
    _check_tokens(output, lines, path, output_field)
    kept = (prompt >= 1) & (output >= 1)
    left_out = len(kept) - int(kept.sum())
    if left_out == len(kept):
        raise TraceError(f"{path}: no request has both {prompt_field} and {output_field} of at least 1")
    if left_out:
        notes.append(
            f"{path}: {left_out} of {len(kept)} rows left out, whose {prompt_field} or {output_field} is 0 "
            "(failed requests)"
        )
    kept_s = time_s[kept]
    return TraceTable(
        arrival_s=kept_s - kept_s[0],
        prompt_tokens=prompt[kept].astype(np.int64),
        output_tokens=output[kept].astype(np.int64),
        notes=tuple(notes),
    )


def read_sharegpt_lengths(path: str | Path) -> dict[str, NDArray[np.float64]]:
    """Read ``prompt_tokens`` and ``output_tokens`` of a ShareGPT file, estimated as words / 0.75, rounded, at least 1.

    As vLLM's load generator does, entries with fewer than two turns are left out, the first turn is the prompt and the
    second the answer. Unlike there, short and long ones stay.

    Raises:
        TraceError: no such file, not JSON, an entry of another shape, or no entry with two turns.
    """
    with _opened(path) as file:
        try:
            entries = json.load(file)
        except json.JSONDecodeError as error:
            raise TraceError(f"{path}, line {error.lineno}: not JSON ({error.msg}); expected a ShareGPT list") from None
    if not isinstance(entries, list):
        raise TraceError(f"{path}: expected a list of conversations, got {type(entries).__name__}")
    lengths: tuple[list[float], list[float]] = ([], [])
    for number, entry in enumerate(entries, start=1):
        try:
            turns = entry["conversations"]
            words = [len(turn["value"].split()) for turn in turns[:2]]
        except (TypeError, KeyError, AttributeError):
            raise TraceError(
                f'{path}, entry {number}: expected {{"conversations": [{{"value": text}}, ...]}}, '
                f"got {_shortened(json.dumps(entry))}"
            ) from None
        if len(words) == 2:
            for column, count in zip(lengths, words, strict=True):
                column.append(max(1.0, round(count / WORDS_PER_TOKEN)))
    if not lengths[0]:
        raise TraceError(f"{path}: no conversation has two turns")
    return {name: np.array(column) for name, column in zip(SHAREGPT_COLUMNS, lengths, strict=True)}


# ---------------------------------------------------------------------------------------------------------- files


def _is_json(path: str) -> bool:
    return path.removesuffix(".gz").endswith(".json")


@contextmanager
def _opened(path: str | Path) -> Iterator[TextIO]:
    """Open a text file, unpacked by its name, and turn what can go wrong while reading it into a TraceError."""
    try:
        if str(path).endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8-sig") as packed:
                yield packed
        else:
            with Path(path).open(encoding="utf-8-sig") as plain:
                yield plain
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TraceError(f"{path}: cannot be read ({reason})") from None


def _read_csv(path: str | Path) -> "pd.DataFrame":
    """Read a CSV file with a header; blank lines are dropped, and the index keeps counting them."""
    import pandas as pd  # slow to import, and only needed with such a file

    with _opened(path) as file:
        try:
            table = pd.read_csv(file, skip_blank_lines=False, skipinitialspace=True, low_memory=False)
        except pd.errors.EmptyDataError:
            raise TraceError(f"{path}: empty; expected a header line and rows") from None
        except pd.errors.ParserError as error:
            raise TraceError(f"{path}: not a CSV table ({str(error).strip()})") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas took surplus leading fields for row names
        raise TraceError(f"{path}, line 2: more fields than the header's {len(table.columns)}")
    table.columns = table.columns.str.strip()
    table = table.dropna(how="all")
    if table.empty:
        raise TraceError(f"{path}: no rows below the header")
    return table


def _lines(table: "pd.DataFrame") -> NDArray[np.int64]:
    return table.index.to_numpy(np.int64) + 2  # the header is line 1


def _missing_column(path: str | Path, name: str, present: Sequence[str]) -> str:
    return f"{path}: no column {name!r}; the file has {', '.join(present)}"


def _numbers(table: "pd.DataFrame", name: str, path: str | Path) -> NDArray[np.float64]:
    """Return a column as finite numbers >= 0."""
    import pandas as pd

    if name not in table.columns:
        raise TraceError(_missing_column(path, name, list(table.columns)))
    values = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        raise TraceError(_bad_cell(table, name, path, int(bad.argmax()), "a number >= 0"))
    return values


def _dates_s(table: "pd.DataFrame", name: str, path: str | Path) -> NDArray[np.float64]:
    """Return a column of ISO dates as seconds since the first, exact to the nanosecond before conversion."""
    import pandas as pd

    if name not in table.columns:
        raise TraceError(_missing_column(path, name, list(table.columns)))
    dates = pd.to_datetime(table[name].astype("string"), format="ISO8601", utc=True, errors="coerce")
    bad = dates.isna().to_numpy()
    if bad.any():
        expected = "a date and time such as 2023-11-16 18:15:46.6805900"
        raise TraceError(_bad_cell(table, name, path, int(bad.argmax()), expected))
    return np.asarray((dates - dates.iloc[0]).dt.total_seconds(), dtype=np.float64)


def _bad_cell(table: "pd.DataFrame", name: str, path: str | Path, row: int, expected: str) -> str:
    cell = table[name].iloc[row]
    got = "nothing" if cell != cell else repr(str(cell))  # NaN: an empty cell
    return f"{path}, line {_lines(table)[row]}, column {name!r}: expected {expected}, got {got}"


def _read_json_lines(
    path: str | Path, fields: tuple[str, str, str]
) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
    """Return the line numbers, the three fields with shape (3, n), and whether prompts carry ``hash_ids``."""
    lines: list[int] = []
    rows: list[list[float]] = []
    has_hashes = False
    with _opened(path) as file:
        for line, text in enumerate(file, start=1):
            if text.isspace():
                continue
            try:
                entry = json.loads(text)
            except json.JSONDecodeError as error:
                raise TraceError(f"{path}, line {line}: not JSON ({error.msg}); expected one object a line") from None
            if not isinstance(entry, dict):
                raise TraceError(f"{path}, line {line}: expected an object, got {_shortened(text)}")
            rows.append([_json_number(entry, name, path, line) for name in fields])
            lines.append(line)
            has_hashes = has_hashes or "hash_ids" in entry
    if not rows:
        raise TraceError(f"{path}: empty; expected one object a line with {', '.join(fields)}")
    return np.array(lines), np.array(rows, dtype=np.float64).T, has_hashes


def _json_number(entry: dict[str, Any], name: str, path: str | Path, line: int) -> float:
    if name not in entry:
        raise TraceError(f"{path}, line {line}: no field {name!r}; the object has {', '.join(entry) or 'none'}")
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        got = _shortened(json.dumps(value))
        raise TraceError(f"{path}, line {line}, field {name!r}: expected a number >= 0, got {got}")
    return float(value)


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:57] + "..."


# --------------------------------------------------------------------------------------------------------- checks


def _check_ordered(time_s: NDArray[np.float64], lines: NDArray[np.int64], path: str | Path, name: str) -> None:
    back = np.diff(time_s) < 0
    if back.any():
        row = int(back.argmax()) + 1
        raise TraceError(
            f"{path}, line {lines[row]}, {name!r}: {time_s[row - 1] - time_s[row]:g} s before line {lines[row - 1]}; "
            "expected times that never go back: sort the file by time"
        )


def _check_tokens(tokens: NDArray[np.float64], lines: NDArray[np.int64], path: str | Path, name: str) -> None:
    bad = (tokens != np.rint(tokens)) | (tokens > MAX_TOKENS)
    if bad.any():
        row = int(bad.argmax())
        raise TraceError(
            f"{path}, line {lines[row]}, {name!r}: expected a whole number of tokens up to {MAX_TOKENS}, "
            f"got {tokens[row]:g}"
        )
