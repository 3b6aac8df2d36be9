"""What each iteration computed is worked out from the requests alone, exactly, against recordings of the real one."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrate.measure.grid import Point
from calibrate.measure.iteration_records import SentRequest, admissions, lines_of, reconstruct, sent_frame, sent_of
from real.experts.iteration_log import IterationLine
from sim.fleet import EngineSettings
from sim.service_curve import IterationWork
from tests.iteration_runs import SETTINGS, requests_of, run_engine, seconds

DATA = Path(__file__).parent / "data"


def recording(letter: str) -> tuple[EngineSettings, list[IterationLine], list[SentRequest], list[dict[str, int]]]:
    """A recorded run as vLLM would have logged it: by its own rule, a request without output is context."""
    with gzip.open(DATA / f"golden_{letter}.json.gz", "rt") as file:
        content: dict[str, Any] = json.load(file)
    settings = content["settings"]
    prompts = [request["prompt_tokens"] for request in content["requests"]]
    computed, outputs = [0] * len(prompts), [0] * len(prompts)
    lines: list[IterationLine] = []
    kv_read, first_s = [], [0.0] * len(prompts)
    for iteration in content["iterations"]:
        for number in iteration["preempted"]:
            computed[number] = 0
        counts = [0, 0, 0, 0]
        read = {"decode": 0, "prefill": 0}
        for number, tokens in iteration["scheduled"]:
            kind = 2 if outputs[number] else 0
            counts[kind] += 1
            counts[kind + 1] += tokens
            is_decode = outputs[number] and tokens == 1 == prompts[number] + outputs[number] - computed[number]
            computed[number] += tokens
            read["decode" if is_decode else "prefill"] += computed[number]
            if computed[number] == prompts[number] + outputs[number]:
                outputs[number] += 1
                if outputs[number] == 1:
                    first_s[number] = len(lines) + 1.5
        if iteration["scheduled"]:
            first, second, third, fourth = counts
            lines.append(IterationLine(0, len(lines), len(lines) + 1.0, first, second, third, fourth, 0.9, None))
            kv_read.append(read)
    sent = [
        SentRequest(
            point="golden",
            number=number,
            prompt_tokens=request["prompt_tokens"],
            output_tokens=request["output_tokens"],
            sent_s=number * 1e-6,
            first_token_s=first_s[number],
        )
        for number, request in enumerate(content["requests"])
    ]
    engine = EngineSettings(
        max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        max_model_len=settings["max_model_len"],
        block_size=settings["block_size"],
        num_kv_blocks=settings["num_kv_blocks"] - 1,
        enable_prefix_caching=False,
        scheduler_reserve_full_isl=True,
        async_scheduling=settings["async_scheduling"],
    )
    return engine, lines, sent, kv_read


@pytest.mark.parametrize("letter", ["a", "b", "c"])  # b preempts; those that share prefixes are not measured so
def test_kv_reads_of_the_real_scheduler_are_found_from_counts_and_requests(letter: str) -> None:
    settings, lines, sent, kv_read = recording(letter)
    records = reconstruct(lines, sent, settings, "golden")
    assert records["matched"].all()
    assert records["decode_kv_tokens"].tolist() == [read["decode"] for read in kv_read]
    assert records["prefill_kv_tokens"].tolist() == [read["prefill"] for read in kv_read]


def test_records_do_not_match_where_the_log_is_of_other_requests() -> None:
    settings, lines, sent, _ = recording("a")
    wrong = [*sent[:5], *sent[6:]]
    records = reconstruct(lines, wrong, settings, "golden")
    assert not records["matched"].all()
    first = int(np.flatnonzero(~records["matched"])[0])
    assert not records["matched"][first:].any()
    assert (records["decodes"][first:] == 0).all()


def test_a_cycle_after_an_idle_engine_is_unknown() -> None:
    sent = [
        SentRequest(point="p", number=n, prompt_tokens=20, output_tokens=5, sent_s=sent_s)
        for n, sent_s in enumerate([0.0, 10.0])
    ]
    lines, seen = run_engine(sent)
    records = reconstruct(lines, seen, SETTINGS, "p")
    assert records["matched"].all()
    assert records.index[records["cycle_s"].isna()].tolist() == [0, 5]
    assert records["cycle_s"][1] == pytest.approx(seconds(IterationWork(0, 0, 0.0, 0, 1, 21)))


def test_order_of_admission_follows_first_tokens_not_sending() -> None:
    sent = [
        SentRequest(point="p", number=n, prompt_tokens=tokens, output_tokens=30, sent_s=0.001 * n)
        for n, tokens in enumerate([100, 40, 70])
    ]
    lines, seen = run_engine(sent, entry_s=lambda number: [0.09, 0.01, 0.05][number])
    assert reconstruct(lines, seen, SETTINGS, "p")["matched"].all()
    first, second, third = admissions(lines, seen, SETTINGS)
    assert second is not None
    assert third is not None
    assert first is not None
    assert second < third < first


def test_a_point_of_late_prompts_is_understood() -> None:
    point = Point(kind="steps", requests=6, prompt_tokens=300, output_tokens=60, late=3, late_tokens=700)
    lines, seen = run_engine(requests_of(point, "p"))
    records = reconstruct(lines, seen, SETTINGS, "p")
    assert records["matched"].all()
    assert records["prefill_tokens"].sum() == 6 * 300 + 3 * 700


def test_records_and_requests_survive_their_frames() -> None:
    lines, seen = run_engine([SentRequest(point="p", number=0, prompt_tokens=20, output_tokens=5, sent_s=0.0)])
    assert lines_of(reconstruct(lines, seen, SETTINGS, "p")) == lines
    assert sent_of(sent_frame(seen)) == seen
