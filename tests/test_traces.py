import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.spec import ClassSpec, ClosedLoop, Empirical, Fixed, Load, OpenLoop, Trace, WorkloadSpec
from sim.traces import TraceError, TraceFormat, read_sharegpt_lengths, read_trace, read_workload_data
from sim.traffic import TraceTable

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
FIRST = "2023-11-16 18:15:46,374,44\n"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
BURSTGPT = """Timestamp (s),Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,1,0.5,ChatGPT,472,18,490,Conversation log
45.5,2,0.7,GPT-4,1087,230,1317,API log
118,3,,ChatGPT,417,0,417,Conversation log
200,3,1.0,ChatGPT,10,20,30,API log
"""
BURSTGPT_2023 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,230,1317,Conversation log
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 1500, "input_length": 7322, "output_length": 490, "hash_ids": [0, 3]}
{"timestamp": 4000, "input_length": 20, "output_length": 1, "hash_ids": []}
"""
TIMED_TRACE = """{"timestamp": 0.5, "input_length": 100, "output_length": 10}

{"timestamp": 0.5, "input_length": 200, "output_length": 20}
{"timestamp": 2.0, "input_length": 300, "output_length": 30}
"""
SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "w " * 75}]},
    {"id": "b", "conversations": [{"from": "human", "value": "never answered"}]},
    {"id": "c", "conversations": []},
    {"id": "d", "conversations": [{"value": ""}, {"value": "six words are eight tokens here"}, {"value": "more"}]},
]


def written(folder: Path, text: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def rows(table: TraceTable) -> list[tuple[float, int, int]]:
    columns = (table.arrival_s.tolist(), table.prompt_tokens.tolist(), table.output_tokens.tolist())
    return list(zip(*columns, strict=True))


# -------------------------------------------------------------------------------------------------------- formats


def test_azure_dates_keep_their_seven_decimals(tmp_path: Path) -> None:
    table = read_trace(written(tmp_path, AZURE), "azure")
    assert rows(table) == [(0.0, 374, 44), (pytest.approx(4.314579, abs=1e-9), 396, 109), (4.541877, 879, 55)]
    assert table.notes == ()


def test_azure_2024_dates_with_a_zone_and_fewer_decimals(tmp_path: Path) -> None:
    text = HEADER + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,1,6\n"
    assert rows(read_trace(written(tmp_path, text), "azure")) == [(0.0, 2162, 5), (0.99007, 1, 6)]


def test_decimals_may_begin_after_the_first_row(tmp_path: Path) -> None:
    text = HEADER + FIRST + "2023-11-16 18:15:46.1234567,1,6\n"
    assert read_trace(written(tmp_path, text), "azure").arrival_s.tolist() == [0.0, pytest.approx(0.1234567, abs=1e-9)]


def test_packed_azure_with_windows_line_ends_and_no_last_line_end_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv.gz"
    path.write_bytes(gzip.compress(AZURE.strip().replace("\n", "\r\n").encode()))
    assert rows(read_trace(path, "azure")) == rows(read_trace(written(tmp_path, AZURE), "azure"))


def test_burstgpt_leaves_failed_requests_out_and_counts_them(tmp_path: Path) -> None:
    path = written(tmp_path, BURSTGPT)
    table = read_trace(path, "burstgpt")
    assert rows(table) == [(0.0, 472, 18), (40.5, 1087, 230), (195.0, 10, 20)]
    assert table.notes == (
        f"{path}: 1 of 4 rows left out, whose Request tokens or Response tokens is 0 (failed requests)",
    )


def test_burstgpt_is_read_by_column_name_so_older_files_work(tmp_path: Path) -> None:
    assert rows(read_trace(written(tmp_path, BURSTGPT_2023), "burstgpt")) == [(0.0, 472, 18), (40.0, 1087, 230)]


def test_mooncake_times_are_milliseconds_and_unused_hashes_are_noted(tmp_path: Path) -> None:
    path = written(tmp_path, MOONCAKE)
    table = read_trace(path, "mooncake")
    assert rows(table) == [(0.0, 6758, 500), (0.5, 7322, 490), (3.0, 20, 1)]
    assert table.notes == (f"{path}: hash_ids are not used; prompts share no prefix beyond shared_prefix_tokens",)


def test_timed_trace_times_are_seconds_and_ties_and_blank_lines_are_fine(tmp_path: Path) -> None:
    assert rows(read_trace(written(tmp_path, TIMED_TRACE), "timed_trace")) == [
        (0.0, 100, 10),
        (0.0, 200, 20),
        (1.5, 300, 30),
    ]


@pytest.mark.parametrize(
    ("text", "trace_format", "unit", "last_s"),
    [
        (MOONCAKE, "mooncake", "s", 3000.0),
        (TIMED_TRACE, "timed_trace", "ms", 0.0015),
        (BURSTGPT, "burstgpt", "ms", 0.195),
    ],
)
def test_stated_time_unit_wins(tmp_path: Path, text: str, trace_format: TraceFormat, unit: Any, last_s: float) -> None:
    table = read_trace(written(tmp_path, text), trace_format, unit)
    assert table.arrival_s[-1] == pytest.approx(last_s)


def test_times_count_from_the_first_request_that_is_kept(tmp_path: Path) -> None:
    failed_first = BURSTGPT_2023.replace("472,18", "472,0")
    assert read_trace(written(tmp_path, failed_first), "burstgpt").arrival_s.tolist() == [0.0]


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("trace_format", "text", "message"),
    [
        ("azure", "", "{path}: empty; expected a header line and rows"),
        ("azure", HEADER, "{path}: no rows below the header"),
        (
            "azure",
            "TIMESTAMP,Tokens\n2023-11-16,1\n",
            "{path}: no column 'ContextTokens'; the file has TIMESTAMP, Tokens",
        ),
        (
            "azure",
            HEADER + FIRST + "\n" + "yesterday,1,1\n",
            "{path}, line 4, column 'TIMESTAMP': expected a date and time such as 2023-11-16 18:15:46.6805900, "
            "got 'yesterday'",
        ),
        (
            "azure",
            HEADER + "0,374,44\n1,374,44\n",
            "{path}, line 2, column 'TIMESTAMP': expected a date and time such as 2023-11-16 18:15:46.6805900, got '0'",
        ),
        (
            "azure",
            HEADER + FIRST + "2023-11-16 18:15:47,many,44\n",
            "{path}, line 3, column 'ContextTokens': expected a number >= 0, got 'many'",
        ),
        (
            "azure",
            HEADER + FIRST + "2023-11-16 18:15:47,374\n",
            "{path}, line 3, column 'GeneratedTokens': expected a number >= 0, got nothing",
        ),
        (
            "azure",
            HEADER + FIRST + "2023-11-16 18:15:47,-3,44\n",
            "{path}, line 3, column 'ContextTokens': expected a number >= 0, got '-3'",
        ),
        (
            "azure",
            HEADER + FIRST + "2023-11-16 18:15:47,3.5,44\n",
            "{path}, line 3, 'ContextTokens': expected a whole number of tokens up to 2147483647, got 3.5",
        ),
        (
            "azure",
            HEADER + FIRST + "2023-11-16 18:15:47,1e10,44\n",
            "{path}, line 3, 'ContextTokens': expected a whole number of tokens up to 2147483647, got 1e+10",
        ),
        (
            "azure",
            HEADER + FIRST + "2023-11-16 18:15:44,374,44\n",
            "{path}, line 3, 'TIMESTAMP': 2 s before line 2; expected times that never go back: sort the file by time",
        ),
        ("azure", HEADER + "2023-11-16,1,1,9\n", "{path}, line 2: more fields than the header's 3"),
        (
            "azure",
            HEADER + FIRST + "2023-11-16,1,1,9\n",
            "{path}: not a CSV table (Error tokenizing data. C error: Expected 3 fields in line 3, saw 4)",
        ),
        (
            "burstgpt",
            BURSTGPT_2023.replace(",18,", ",0,").replace(",230,", ",0,"),
            "{path}: no request has both Request tokens and Response tokens of at least 1",
        ),
        (
            "burstgpt",
            BURSTGPT_2023.replace("Timestamp", "Time"),
            "{path}: no column 'Timestamp'; the file has Time, Model, Request tokens, Response tokens, "
            "Total tokens, Log Type",
        ),
        ("mooncake", "\n", "{path}: empty; expected one object a line with timestamp, input_length, output_length"),
        (
            "mooncake",
            MOONCAKE + "{'timestamp': 1}\n",
            "{path}, line 4: not JSON (Expecting property name enclosed in double quotes); expected one object a line",
        ),
        ("mooncake", "[1, 2, 3]\n", "{path}, line 1: expected an object, got [1, 2, 3]"),
        (
            "timed_trace",
            '{"timestamp": 1, "input_length": 5}\n',
            "{path}, line 1: no field 'output_length'; the object has timestamp, input_length",
        ),
        (
            "timed_trace",
            '{"timestamp": "0", "input_length": 5, "output_length": 5}\n',
            "{path}, line 1, field 'timestamp': expected a number >= 0, got \"0\"",
        ),
        (
            "timed_trace",
            '{"timestamp": NaN, "input_length": 5, "output_length": 5}\n',
            "{path}, line 1, field 'timestamp': expected a number >= 0, got NaN",
        ),
        (
            "timed_trace",
            TIMED_TRACE + '{"timestamp": 1.25, "input_length": 5, "output_length": 5}\n',
            "{path}, line 5, 'timestamp': 0.75 s before line 4; expected times that never go back: "
            "sort the file by time",
        ),
    ],
)
def test_trace_error_names_file_line_and_field(
    tmp_path: Path, trace_format: TraceFormat, text: str, message: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        read_trace(path, trace_format)
    assert str(caught.value) == message.format(path=path)


def test_time_unit_for_dates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="time_unit 'ms' does not apply to azure traces, whose times are dates"):
        read_trace(written(tmp_path, AZURE), "azure", "ms")


@pytest.mark.parametrize(("trace_format", "text"), [("azure", AZURE), ("mooncake", MOONCAKE)])
def test_file_that_cannot_be_read_says_why(tmp_path: Path, trace_format: TraceFormat, text: str) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.csv: cannot be read \(No such file or directory\)"):
        read_trace(tmp_path / "nowhere.csv", trace_format)
    with pytest.raises(TraceError, match=r"plain\.gz: cannot be read \(Not a gzipped file"):
        read_trace(written(tmp_path, text, "plain.gz"), trace_format)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(TraceError, match=r"cut\.gz: cannot be read \(Compressed file ended before"):
        read_trace(cut, trace_format)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\x80\x81\x82")
    with pytest.raises(TraceError, match=r"binary: not UTF-8 text \(invalid start byte at byte 0\)"):
        read_trace(binary, trace_format)


# ------------------------------------------------------------------------------------------------ empirical lengths


def test_sharegpt_lengths_are_words_over_three_quarters_of_the_first_two_turns(tmp_path: Path) -> None:
    lengths = read_sharegpt_lengths(written(tmp_path, json.dumps(SHAREGPT)))
    assert {name: values.tolist() for name, values in lengths.items()} == {
        "prompt_tokens": [4.0, 1.0],
        "output_tokens": [100.0, 8.0],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "{path}, line 1: not JSON (Expecting property name enclosed in double quotes); expected a ShareGPT list"),
        ("{}", "{path}: expected a list of conversations, got dict"),
        ("[]", "{path}: no conversation has two turns"),
        (
            '[{"conversations": [{"text": "hello"}]}]',
            '{path}, entry 1: expected {"conversations": [{"value": text}, ...]}, '
            'got {"conversations": [{"text": "hello"}]}',
        ),
        ("[7]", '{path}, entry 1: expected {"conversations": [{"value": text}, ...]}, got 7'),
    ],
)
def test_sharegpt_error_names_file_and_place(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        read_sharegpt_lengths(path)
    assert str(caught.value) == message.replace("{path}", str(path))


def chat(prompt: Empirical | Fixed, output: Empirical | Fixed, load: Load | None = None) -> WorkloadSpec:
    return WorkloadSpec(
        classes={"chat": ClassSpec(prompt_tokens=prompt, output_tokens=output)}, load=load or OpenLoop(rate_rps=1.0)
    )


def test_workload_columns_are_read_sorted_from_csv(tmp_path: Path) -> None:
    file = str(written(tmp_path, AZURE, "lengths.csv"))
    prompt, output = Empirical(file=file, column="ContextTokens"), Empirical(file=file, column="GeneratedTokens")
    data = read_workload_data(chat(prompt, output))
    assert data.column(prompt).tolist() == [374, 396, 879]
    assert data.column(output).tolist() == [44, 55, 109]
    assert data.trace is None
    assert data.notes == ()


def test_workload_takes_think_times_from_a_file(tmp_path: Path) -> None:
    think = Empirical(file=str(written(tmp_path, "think_s\n2.5\n0\n", "think.csv")), column="think_s")
    data = read_workload_data(chat(Fixed(value=1), Fixed(value=1), ClosedLoop(users=1, think_time_s=think)))
    assert data.column(think).tolist() == [0.0, 2.5]


def test_workload_takes_lengths_from_sharegpt_and_says_they_are_estimates(tmp_path: Path) -> None:
    file = str(written(tmp_path, json.dumps(SHAREGPT), "sharegpt.json"))
    prompt = Empirical(file=file, column="prompt_tokens")
    data = read_workload_data(chat(prompt, Fixed(value=8)))
    np.testing.assert_array_equal(data.column(prompt), [1.0, 4.0])
    assert data.notes == (f"{file}: token counts are words / 0.75, not a tokenizer's; 2 conversations",)


def test_unknown_sharegpt_column_names_the_two_there_are(tmp_path: Path) -> None:
    file = str(written(tmp_path, json.dumps(SHAREGPT), "sharegpt.json"))
    with pytest.raises(TraceError, match="no column 'prompt'; the file has prompt_tokens, output_tokens"):
        read_workload_data(chat(Empirical(file=file, column="prompt"), Fixed(value=8)))


def test_workload_with_a_trace_reads_the_trace_and_no_lengths(tmp_path: Path) -> None:
    file = str(written(tmp_path, BURSTGPT, "trace.csv"))
    unused = Empirical(file=str(tmp_path / "nowhere.csv"), column="x")
    data = read_workload_data(chat(unused, unused, Trace(file=file, format="burstgpt")))
    assert data.trace is not None
    assert len(data.trace.arrival_s) == 3
    assert data.columns == {}
    assert data.notes == data.trace.notes != ()
