"""What requests and tokens cost in a front end comes out of sending times and the log."""

from dataclasses import replace

import pandas as pd
import pytest

from calibrate.measure.files import MeasuredPoint
from calibrate.measure.front_end_fit import fit_front_end
from calibrate.measure.iteration_records import SentRequest, reconstruct, sent_frame
from calibrate.measure.router import PROMPT_TOKENS, Traffic, costs_of
from sim.profile import Parameter
from tests.iteration_runs import SETTINGS, TRUTH, run_engine

REQUEST_S, DELAY_S, TOKEN_S, PROMPT_TOKEN_S = 4e-3, 6e-3, 2e-4, 2e-6
HOST_S = 8e-4


def point(
    label: str, sent: list[SentRequest], *, one_by_one: bool, coming_s: float = 0.0, leaving_s: float = 0.0
) -> tuple[MeasuredPoint, pd.DataFrame, pd.DataFrame]:
    """Serve a point through a front end with the costs above, and what requests take from the engine besides."""

    def entry_s(number: int) -> float:
        work_s = REQUEST_S * (1 if one_by_one else number + 1)
        return work_s + DELAY_S

    lines, seen = run_engine(sent, entry_s=entry_s, host_s=lambda _: HOST_S, coming_s=coming_s, leaving_s=leaving_s)
    ends = {line.ended_s: line.context_requests + line.generation_requests for line in lines}

    def received_s(time_s: float) -> float:
        end_s = max(end for end in ends if end <= time_s)
        return end_s + TOKEN_S * ends[end_s]

    seen = [
        replace(r, first_token_s=received_s(r.first_token_s), last_token_s=received_s(r.last_token_s)) for r in seen
    ]
    prompts, outputs = sum(r.prompt_tokens for r in sent), sum(r.output_tokens for r in sent)
    records = reconstruct(lines, seen, SETTINGS, label)
    measured = MeasuredPoint(
        label=label,
        started_s=0,
        took_s=1,
        requests=len(sent),
        prompt_tokens=prompts,
        output_tokens=outputs,
        iterations=len(lines),
        matched=1,
        front_end_cpu_s=1e-3 * len(sent) + PROMPT_TOKEN_S * prompts + 1e-4 * outputs + 5e-4 * len(lines),
    )
    return measured, records, sent_frame(seen)


def requests(label: str, count: int, prompt: int, output: int, gap_s: float) -> list[SentRequest]:
    return [
        SentRequest(point=label, number=n, prompt_tokens=prompt, output_tokens=output, sent_s=gap_s * n)
        for n in range(count)
    ]


def test_costs_are_found_from_simultaneous_and_idle_requests() -> None:
    parts = [
        point(f"steps batch={n}#1", requests(f"steps batch={n}#1", n, prompt, 24, 0.0), one_by_one=False)
        for n, prompt in ((4, 16), (8, 300), (16, 16), (24, 64), (32, 16))
    ]
    parts += [
        point(f"idle prompt={n}#1", requests(f"idle prompt={n}#1", 3, n, 6, 5.0), one_by_one=True)
        for n in (16, 128, 400)
    ]
    points, records, sent = zip(*parts, strict=True)
    frames = pd.concat(sent), pd.concat(records)
    front_end = fit_front_end(list(points), *frames, SETTINGS, TRUTH, shares_cores=True)
    assert front_end is not None
    assert front_end.per_request_s.value == pytest.approx(REQUEST_S, rel=0.2)
    assert front_end.per_output_token_s.value == pytest.approx(TOKEN_S, rel=0.1)
    assert front_end.per_prompt_token_s.value == pytest.approx(PROMPT_TOKEN_S, rel=0.1)
    assert front_end.delay_s.value == pytest.approx(DELAY_S, abs=1.5e-3)


def test_what_requests_take_from_a_busy_engine_is_seen_in_its_iterations() -> None:
    label = "steps batch=8 context=24 late=24#1"
    users = requests(label, 40, 24, 30, 0.23)
    idle = point("idle prompt=16#1", requests("idle prompt=16#1", 3, 16, 6, 5.0), one_by_one=True)
    few = [
        point(f"steps batch={n}#1", requests(f"steps batch={n}#1", n, 16, 24, 0.0), one_by_one=False)
        for n in (4, 8, 16, 24)
    ]

    def found(*, coming_s: float, leaving_s: float, shares_cores: bool = True, label: str = label) -> Parameter | None:
        live = point(
            label,
            [replace(user, point=label) for user in users],
            one_by_one=True,
            coming_s=coming_s,
            leaving_s=leaving_s,
        )
        points, records, sent = zip(idle, *few, live, strict=True)
        costs = fit_front_end(
            list(points), pd.concat(sent), pd.concat(records), SETTINGS, TRUTH, shares_cores=shares_cores
        )
        assert costs is not None
        return costs.per_request_engine_s

    both = found(coming_s=5e-3, leaving_s=2e-3)
    assert both is not None
    assert both.value == pytest.approx(7e-3, rel=0.1)
    nothing = found(coming_s=0.0, leaving_s=0.0)
    assert nothing is not None
    assert nothing.value == pytest.approx(0.0, abs=2e-4)
    assert found(coming_s=5e-3, leaving_s=2e-3, shares_cores=False) is None
    assert found(coming_s=5e-3, leaving_s=2e-3, label="closed users=8#1") is None, "a check is kept out"


def test_a_token_takes_at_least_its_cpu_time_where_the_front_end_has_cores_of_its_own() -> None:
    parts = [
        point(f"steps batch={n}#1", requests(f"steps batch={n}#1", n, prompt, 24, 0.0), one_by_one=False)
        for n, prompt in ((4, 16), (8, 300), (16, 16), (24, 64))
    ]
    parts += [point("idle prompt=16#1", requests("idle prompt=16#1", 3, 16, 6, 5.0), one_by_one=True)]
    points, records, sent = zip(*parts, strict=True)
    dear = [
        each.model_copy(update={"front_end_cpu_s": (each.front_end_cpu_s or 0.0) + 1e-3 * each.output_tokens})
        for each in points
    ]
    frames = pd.concat(sent), pd.concat(records)
    apart = fit_front_end(dear, *frames, SETTINGS, TRUTH, shares_cores=False)
    together = fit_front_end(dear, *frames, SETTINGS, TRUTH, shares_cores=True)
    assert apart is not None
    assert together is not None
    assert apart.per_output_token_s.value > 0.9e-3
    assert together.per_output_token_s.value == pytest.approx(TOKEN_S, rel=0.1)


def test_too_few_points_give_no_front_end() -> None:
    measured, records, sent = point("idle prompt=16#1", requests("idle prompt=16#1", 3, 16, 6, 5.0), one_by_one=True)
    assert fit_front_end([measured], sent, records, SETTINGS, TRUTH, shares_cores=True) is None


def test_router_costs_come_from_two_output_lengths_of_one_and_of_many_users_without_the_idle_gateway() -> None:
    def load(users: int, output_tokens: int, requests: int) -> Traffic:
        work_s = 3e-4 + 1e-6 * PROMPT_TOKENS + (4e-5 + 8e-5 / users) * output_tokens
        cpu_s = requests * work_s + 0.06
        return Traffic(users=users, requests=requests, output_tokens=output_tokens, cpu_s=cpu_s, took_s=6.0)

    loads = [load(1, 4, 50), load(1, 64, 10), load(32, 4, 800), load(32, 64, 200)]
    costs = costs_of(loads, 0.01, 1e-6)
    assert costs.per_request_s == pytest.approx(3e-4)
    assert costs.per_output_token_s == pytest.approx(4e-5)
    assert costs.per_wake_up_s == pytest.approx(8e-5)


def test_costs_that_noise_makes_negative_are_none() -> None:
    loads = [Traffic(users=n, requests=10, output_tokens=k, cpu_s=0.01, took_s=1.0) for n in (1, 32) for k in (4, 64)]
    costs = costs_of(loads, 0.02, 1e-6)
    assert (costs.per_request_s, costs.per_output_token_s, costs.per_wake_up_s) == (0, 0, 0)
