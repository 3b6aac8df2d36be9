import io

import pytest
from rich.console import Console

from sim.report import count_text, number_text, print_report
from sim.result import Result
from sim.spec import SloSpec
from tests.run_records import make_result


def printed(result: Result, width: int) -> str:
    stream = io.StringIO()
    print_report(result, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_lines_fit_and_nothing_is_cut(width: int) -> None:
    text = printed(make_result(slo=SloSpec(ttft_ms=200), notes=("the backlog grows",)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_a_narrow_terminal_keeps_the_telling_figures_and_a_wide_one_has_all() -> None:
    result = make_result(slo=SloSpec(ttft_ms=200))
    narrow, wide = printed(result, 80), printed(result, 200)
    assert all(heading in narrow for heading in ("users", "tokens/s", "TTFT ms", "TPOT ms", "p99", "failed"))
    assert " ±" not in narrow
    assert all(heading in wide for heading in ("goodput", "GPUs", "$ per M", "flight", " ±"))


def test_goodput_is_shown_only_with_an_slo() -> None:
    assert "goodput" not in printed(make_result(), 200)


def test_failed_and_in_flight_requests_are_told_beside_the_percentiles() -> None:
    result = make_result(replications=1, requests=300)
    total = [row for row in result.summary_rows if row["expert"] == "all"]
    failed, in_flight = (sum(row[name] for row in total) for name in ("failed", "in_flight"))
    assert f"{failed} failed, {in_flight} in flight" in " ".join(printed(result, 80).split())


def test_it_names_the_curve_and_the_notes() -> None:
    text = " ".join(printed(make_result(notes=("the backlog grows",)), 80).split())
    assert "Iteration times of all experts: roofline, not calibrated" in text
    assert "Note: fleet 0 at 1 and 100 users; baseline at 1 and 100 users: the backlog grows" in text


def test_experts_are_shown_at_the_highest_load() -> None:
    assert "experts at 100 users" in printed(make_result((1, 100, 20)), 80)


@pytest.mark.parametrize(
    ("kind", "load", "told"), [("open_loop", 2.5, "offered"), ("trace", float("nan"), "the trace")]
)
def test_open_loops_and_traces_are_reported(kind: str, load: float, told: str) -> None:
    assert told in printed(make_result((load,), load_kind=kind), 100)


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    assert "[red] is the colour" in printed(make_result(notes=("[red] is the colour",)), 120)


def test_a_result_without_runs_says_so() -> None:
    assert "interrupted: 0 runs" in printed(make_result((), interrupted=True), 80)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345, "0.0123"), (4.5678, "4.57"), (99.96, "100"), (12345.6, "12,346"), (0.0, "0"), (float("nan"), "-")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(1000.0, "1,000"), (2.5, "2.5"), (7, "7"), (float("nan"), "-")])
def test_counts_are_exact(value: float, text: str) -> None:
    assert count_text(value) == text
