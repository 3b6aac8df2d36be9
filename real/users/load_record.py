"""From what real users saw to the record of a run, in a simulated run's columns: NaN for what they cannot see."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from real.loopback import is_loopback
from real.users.client_lag import ClientLag
from real.users.engine_metrics import EngineMetrics
from real.users.exchange import Exchange
from sim.measuring import IN_STEP, NOT_WARM, Window, in_step, unsteady
from sim.metrics import completed_in_window, ttft_s
from sim.recorder import GAP_RESOLUTION_S
from sim.records import COMPLETED, FAILED, IN_FLIGHT, REQUEST_COLUMNS, RouterStats, RunRecord, TokenGaps
from sim.request import Request
from sim.self_checks import TOLERANCE, Counted, check_requests
from sim.simulation import RunPlan

MAX_LISTED_FAILURES = 4
SHARED_CHUNKS = 0.05  # of tokens that did not come in a chunk of their own


@dataclass(slots=True, eq=False)
class Sent:
    """A request that was sent.

    Attributes:
        request: as it was drawn.
        prompt_tokens: of its prompt by the tokenizer.
        exchange: what came of it.
    """

    request: Request
    prompt_tokens: int
    exchange: Exchange


def load_record(
    plan: RunPlan,
    sent: Sequence[Sent],
    counted: Counted,
    window: Window,
    *,
    began_s: float,
    end_s: float,
    inside_at_start: tuple[int, float],
    lag: ClientLag,
    metrics: EngineMetrics,
    stopped: Sequence[str],
    url: str,
    run_id: str,
) -> RunRecord:
    """Check the outcome of a run and return its record.

    A failed request's ``last_token_s`` is when it failed, as in a simulated run.

    Args:
        plan: what was run.
        sent: every request.
        counted: sent and ended requests, counted as they came.
        window: what was measured.
        began_s: ``time.monotonic()`` at time 0 of the record.
        end_s: when the run ended.
        inside_at_start: requests in flight when the window opened, and their time integral until then.
        lag: how well the client kept up.
        metrics: what the engines told.
        stopped: why the run ended early, if it did.
        url: where requests were sent.
        run_id: begins the ids under which gateway and engines know the requests.

    Raises:
        SelfCheckError: the record breaks conservation or Little's law; a defect of this program.
    """
    notes = [*plan.data.notes, *stopped]
    if isnan(window.start_s):
        notes.append(NOT_WARM)
        window.open(end_s)
    window_s = (window.start_s, end_s)
    requests = _columns(plan, sent, began_s)
    notes += _place_in_router(plan, requests, url)
    left_s = np.array([each.exchange.ended_s for each in sent], np.float64) - began_s
    checks = check_requests(counted, requests, end_s, left_s)
    length_s = end_s - window.start_s
    in_system = counted.in_system
    notes += unsteady(
        requests,
        window_s,
        closed_loop=plan.workload.load.kind == "closed_loop",
        inside=(in_system.area_until(end_s) - inside_at_start[1]) / length_s if length_s > 0 else nan,
        in_flight_at_start=inside_at_start[0],
        in_flight_at_end=in_system.count,
    )
    if in_step(plan.workload, plan.load):
        notes.append(IN_STEP)
    notes += _failures(sent)
    notes += _other_lengths(sent)
    checks["ledger"] = f"{checks['conservation']} and cancelled, as {run_id}-NUMBER"
    checks["load client"] = lag.text()
    names = {
        (index, replica): f"{expert.name}/{replica}"
        for index, expert in enumerate(plan.fleet.experts)
        for replica in range(expert.replicas)
    }
    told = metrics.text(names)
    if told:
        checks["engines"] = told
    record = RunRecord(
        fleet=plan.fleet.name,
        load_kind=plan.workload.load.kind,
        load=plan.load,
        replication=plan.replication,
        expert_names=tuple(expert.name for expert in plan.fleet.experts),
        class_names=tuple(plan.workload.classes),
        requests=requests,
        gaps=_gaps(sent, requests, window_s),
        window_s=window_s,
        replicas=tuple(metrics.stats(*place) for place in names),
        router=None
        if plan.fleet.router is None
        else RouterStats(utilization=nan, requests=_in_router(requests, window_s)),
        checks=checks,
        began_monotonic_s=began_s,
    )
    measured = completed_in_window(record)
    median_s = float(np.median(ttft_s(requests)[measured])) if measured.any() else nan
    notes += lag.notes(median_s)
    return replace(record, notes=tuple(dict.fromkeys(notes)))


# ------------------------------------------------------------------------------------------------------------ columns


def _columns(plan: RunPlan, sent: Sequence[Sent], began_s: float) -> dict[str, NDArray[Any]]:
    experts = {expert.name: index for index, expert in enumerate(plan.fleet.experts)}
    classes = {name: index for index, name in enumerate(plan.workload.classes)}
    only = 0 if len(experts) == 1 else -1
    direct = plan.fleet.router is None

    def row(each: Sent) -> dict[str, float]:
        request, exchange = each.request, each.exchange
        usage = exchange.usage or {}
        headers = exchange.headers
        details = usage.get("prompt_tokens_details") or {}
        ended = not isnan(exchange.ended_s)
        completed = ended and not exchange.failure
        return {
            "request_id": request.request_id,
            "user_id": request.user_id,
            "class_index": request.class_index,
            "routed_class_index": (
                request.class_index if direct else classes.get(headers.get("x-expert-router-class", ""), -1)
            ),
            "expert_index": experts.get(headers.get("x-expert-router-expert", ""), only),
            "replica_index": 0 if direct else _number(headers.get("x-expert-router-replica"), -1),
            "prompt_tokens": usage.get("prompt_tokens", each.prompt_tokens),
            "output_tokens": usage.get("completion_tokens", request.output_tokens),
            "cached_prompt_tokens": details.get("cached_tokens", -1) if isinstance(details, dict) else -1,
            "preemptions": -1,
            "sent_s": exchange.sent_s - began_s,
            "router_start_s": _number(headers.get("x-expert-router-received-s"), nan) - began_s,
            "router_end_s": _number(headers.get("x-expert-router-chosen-s"), nan) - began_s,
            "first_token_s": exchange.first_token_s - began_s,
            "last_token_s": (exchange.last_token_s if completed else exchange.ended_s) - began_s,
            "status": COMPLETED if completed else FAILED if ended else IN_FLIGHT,
            "http_status": exchange.status,
        }

    rows = [row(each) for each in sent]
    return {
        name: np.array([each.get(name, nan) for each in rows], dtype=np.dtype(dtype))
        for name, dtype in REQUEST_COLUMNS.items()
    }


def _number(text: str | None, otherwise: float) -> float:
    try:
        return otherwise if text is None else float(text)
    except ValueError:
        return otherwise


def _place_in_router(plan: RunPlan, requests: dict[str, NDArray[Any]], url: str) -> Iterator[str]:
    """Drop the gateway's times where its clock is not ours, and say what it did not tell."""
    if plan.fleet.router is None:
        return
    answered = requests["status"] == COMPLETED
    start_s, end_s = requests["router_start_s"], requests["router_end_s"]
    if answered.any() and not (requests["expert_index"] >= 0)[answered].all():
        yield (
            "not every answer says which expert gave it (no x-expert-router-expert header, so it did not come through "
            "this project's gateway): figures of single experts leave those out"
        )
    known = ~np.isnan(start_s) & ~np.isnan(end_s)
    if not known.any():
        return
    latest_s = np.fmin(requests["first_token_s"], requests["last_token_s"])
    wrong = (start_s < requests["sent_s"] - TOLERANCE) | (end_s < start_s - TOLERANCE) | (end_s > latest_s + TOLERANCE)
    if not is_loopback(urlsplit(url).hostname or "") or wrong[known].any():
        start_s[:] = nan
        end_s[:] = nan
        yield "the gateway runs on another clock than the users: its own times of each request are left out"


def _in_router(requests: dict[str, NDArray[Any]], window_s: tuple[float, float]) -> float:
    """Mean number of requests between the gateway's door and its choice of a replica."""
    start_s, end_s = (np.clip(requests[name], *window_s) for name in ("router_start_s", "router_end_s"))
    spent_s = (end_s - start_s)[~np.isnan(end_s - start_s)]
    length_s = window_s[1] - window_s[0]
    return float(spent_s.sum()) / length_s if len(spent_s) and length_s > 0 else nan


def _gaps(sent: Sequence[Sent], requests: dict[str, NDArray[Any]], window_s: tuple[float, float]) -> TokenGaps:
    """Every gap between two chunks of the requests that completed in the window, equal ones merged."""
    last_s = requests["last_token_s"]
    measured = np.flatnonzero((requests["status"] == COMPLETED) & (last_s > window_s[0]) & (last_s <= window_s[1]))
    by_expert: dict[int, list[NDArray[np.float64]]] = {}
    for place in measured.tolist():
        gaps = np.diff(np.frombuffer(sent[place].exchange.chunk_s))
        by_expert.setdefault(int(requests["expert_index"][place]), []).append(gaps)
    merged = []
    for expert_index, parts in sorted(by_expert.items()):
        steps, weight = np.unique(
            np.rint(np.concatenate(parts) / GAP_RESOLUTION_S).astype(np.int64), return_counts=True
        )
        merged.append((np.full(len(steps), expert_index, np.int16), steps * GAP_RESOLUTION_S, weight))
    return TokenGaps(
        expert_index=np.concatenate([np.empty(0, np.int16), *(each[0] for each in merged)]),
        gap_s=np.concatenate([np.empty(0, np.float64), *(each[1] for each in merged)]),
        weight=np.concatenate([np.empty(0, np.int64), *(each[2] for each in merged)]).astype(np.int64),
    )


# -------------------------------------------------------------------------------------------------------------- notes


def _failures(sent: Sequence[Sent]) -> Iterator[str]:
    """One note: how many requests failed, of what kind, and an example of each."""
    failed = [each for each in sent if each.exchange.failure and not isnan(each.exchange.ended_s)]
    kinds = Counter(each.exchange.failure for each in failed)
    if not kinds:
        return
    details: dict[str, str] = {}
    for each in failed:
        if each.exchange.detail:
            details.setdefault(each.exchange.failure, each.exchange.detail)
    parts = []
    for kind, count in kinds.most_common(MAX_LISTED_FAILURES):
        detail = f": {' '.join(details[kind].split())[:120]!r}" if kind in details else ""
        parts.append(f"{count:,} {kind}{detail}")
    more = len(kinds) - MAX_LISTED_FAILURES
    yield f"requests failed: {'; '.join(parts)}{f'; and {more} more kinds' if more > 0 else ''}"


def _other_lengths(sent: Sequence[Sent]) -> Iterator[str]:
    """Notes where the server counted other tokens than were asked for, or sent several in a chunk."""
    completed = [each for each in sent if not isnan(each.exchange.ended_s) and not each.exchange.failure]
    done = [each for each in completed if each.exchange.usage is not None]
    if len(completed) > len(done):
        yield (
            f"{len(completed) - len(done):,} answers came without usage: their token counts are what was asked for, "
            "not what the engine counted"
        )
    if not done:
        return
    prompt = np.array([(each.exchange.usage or {}).get("prompt_tokens", nan) for each in done], np.float64)
    output = np.array([(each.exchange.usage or {}).get("completion_tokens", nan) for each in done], np.float64)
    asked = np.array([each.request.prompt_tokens for each in done])
    wanted = np.array([each.request.output_tokens for each in done])
    off = np.abs(prompt - asked)
    if (off > 0).any():
        yield (
            f"{(off > 0).sum():,} of {len(done):,} prompts had another length than asked for, by at most "
            f"{np.nanmax(off):,.0f} tokens, by the server's own count, which is used here"
        )
    if (output != wanted).any():
        yield (
            f"{(output != wanted).sum():,} of {len(done):,} answers had another length than asked for: "
            "the server does not heed ignore_eos and min_tokens"
        )
    tokens = output.sum()
    chunks = sum(len(each.exchange.chunk_s) for each in done)
    if tokens > 0 and 1 - chunks / tokens > SHARED_CHUNKS:
        yield (
            f"{1 - chunks / tokens:.0%} of the tokens came in one chunk with the token before: "
            "ITL is between chunks, TPOT between tokens"
        )
