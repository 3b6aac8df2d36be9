"""Metrics of one run, from its records, by the definitions and names of ``vllm bench serve`` (vLLM 0.33).

Per request, in seconds: ``ttft`` first token minus send; ``e2el`` last token minus send; ``tpot``
``(e2el - ttft) / (output_tokens - 1)``, undefined below two tokens (and then counted as 0 for goodput, as vLLM does);
``itl`` every gap between two tokens of a request, pooled over all requests. Percentiles interpolate linearly between
order statistics, which is numpy's default. What cannot be known is NaN, never 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.fleet import Expert, Fleet
from sim.records import COMPLETED, FAILED, REQUEST_COLUMNS, STATUSES, ReplicaStats, RunRecord, TokenGaps
from sim.spec import ALL_EXPERTS, SloSpec

Floats = NDArray[np.float64]
Requests = Mapping[str, NDArray[Any]]
Row = dict[str, Any]


LOAD_COLUMNS = ("load_kind", "users", "rate_rps")
COUNTS = ("sent", *STATUSES, "measured", "preemptions")
THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput", "good_share")
LATENCIES = ("ttft", "tpot", "itl", "e2el")
WAITS = (
    "router_wait",
    "router_service",
    "front_end_wait",
    "front_end_service",
    "engine_queue",
    "first_token_delivery",
)
CONSTANTS = ("gpus", "cost_per_hour")
"""Columns that are the same in every replication."""

ROUNDING_S = 1e-9  # differences of timestamps below this are floating-point rounding


class Distribution(NamedTuple):
    """Location and spread of a sample, in the sample's unit; every field NaN for an empty one. ``std`` divides by n."""

    mean: float
    std: float
    median: float
    p90: float
    p99: float


# ------------------------------------------------------------------------------------------- per-request definitions


def ttft_s(requests: Requests) -> Floats:
    """Time to first token of each request."""
    return _times(requests, "first_token_s") - _times(requests, "sent_s")


def e2el_s(requests: Requests) -> Floats:
    """End-to-end latency of each request: last token minus send."""
    return _times(requests, "last_token_s") - _times(requests, "sent_s")


def tpot_s(requests: Requests) -> Floats:
    """Time per output token after the first; NaN for requests with fewer than two output tokens."""
    steps = requests["output_tokens"].astype(np.float64) - 1
    decode_s = _times(requests, "last_token_s") - _times(requests, "first_token_s")
    tpot = np.full(len(steps), np.nan)
    np.divide(decode_s, steps, out=tpot, where=steps >= 1)
    return tpot


def wait_s(requests: Requests, fleet: Fleet) -> dict[str, Floats]:
    """Time of each request at each stop before the engine works on it, by the names of ``WAITS``.

    ``front_end_wait`` is the queue before the replica's front end and ``front_end_service`` the front end's own work;
    ``engine_queue`` lasts until the first iteration with a chunk of the request, and ``first_token_delivery`` from the
    end of the iteration that makes the first token until the user has it: the way out, through front end and router
    with all their other tokens. Network delays, which the fleet
    states, belong to neither side and are taken out. Without a router the front end follows the send directly.
    """
    at_front_end = _times(requests, "front_end_start_s")
    at_engine = _times(requests, "engine_arrival_s")
    network_s = 0.0 if fleet.router is None else fleet.router.user_network_s + fleet.router.expert_network_s
    if fleet.router is None:
        router_wait = router_service = np.full(len(at_engine), np.nan)
        front_end_wait = at_front_end - _times(requests, "sent_s")
    else:
        router_wait = _times(requests, "router_start_s") - _times(requests, "sent_s") - fleet.router.user_network_s
        router_service = _times(requests, "router_end_s") - _times(requests, "router_start_s")
        front_end_wait = at_front_end - _times(requests, "router_end_s") - fleet.router.expert_network_s
    return {
        "router_wait": _without_rounding(router_wait),
        "router_service": router_service,
        "front_end_wait": _without_rounding(front_end_wait),
        "front_end_service": at_engine - at_front_end,
        "engine_queue": _without_rounding(_times(requests, "scheduled_s") - at_engine),
        "first_token_delivery": _without_rounding(
            _times(requests, "first_token_s") - _times(requests, "first_token_engine_s") - network_s
        ),
    }


def meets_slo(ttft: Floats, tpot: Floats, e2el: Floats, slo: SloSpec) -> NDArray[np.bool_]:
    """Whether each completed request meets every bound given; arguments in seconds, an undefined TPOT counts as 0."""
    good = np.ones(len(ttft), dtype=np.bool_)
    for value_s, bound_ms in ((ttft, slo.ttft_ms), (np.nan_to_num(tpot), slo.tpot_ms), (e2el, slo.e2el_ms)):
        if bound_ms is not None:
            good &= value_s * 1e3 <= bound_ms
    return good


def completed_in_window(record: RunRecord) -> NDArray[np.bool_]:
    """Mask of the requests whose figures count: completed, with the last token in the measured window."""
    completed = np.asarray(record.requests["status"] == COMPLETED)
    return completed & _in_window(_times(record.requests, "last_token_s"), record)


def failed_in_window(record: RunRecord) -> NDArray[np.bool_]:
    """Mask of the requests that failed in the measured window; a failure ends at its last timestamp."""
    failed = np.asarray(record.requests["status"] == FAILED)
    end_s = _times(record.requests, "last_token_s").copy()
    stamps = [name for name, dtype in REQUEST_COLUMNS.items() if dtype == "float64"]
    end_s[failed] = np.fmax.reduce([_times(record.requests, name)[failed] for name in stamps])
    return failed & _in_window(end_s, record)


# ------------------------------------------------------------------------------------------------------ distributions


def distribution(values: Floats) -> Distribution:
    """Summarise a sample, NaN left out."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Distribution(*[np.nan] * len(Distribution._fields))
    median, p90, p99 = np.percentile(known, (50, 90, 99))
    return Distribution(float(known.mean()), float(known.std()), float(median), float(p90), float(p99))


def weighted_distribution(values: Floats, weights: NDArray[np.int64]) -> Distribution:
    """Summarise the sample in which each value occurs ``weight`` times."""
    order = np.argsort(values)
    return _sorted_weighted_distribution(values[order], weights[order])


def weighted_percentiles(values: Floats, weights: NDArray[np.int64], percents: Sequence[float]) -> Floats:
    """Percentiles of ascending ``values``, each occurring ``weight`` times: ``np.percentile`` of the expanded list."""
    last = np.cumsum(weights)
    position = (last[-1] - 1) * (np.asarray(percents) / 100)
    below = np.floor(position)
    # Rank r is held by the first value whose cumulated weight exceeds r.
    low = values[np.searchsorted(last, below, side="right")]
    high = values[np.searchsorted(last, np.ceil(position), side="right")]
    return np.asarray(low + (high - low) * (position - below))


def _sorted_weighted_distribution(values: Floats, weights: NDArray[np.int64]) -> Distribution:
    total = int(weights.sum())
    if total == 0:
        return Distribution(*[np.nan] * len(Distribution._fields))
    mean = float(values @ weights) / total
    std = float(np.sqrt(np.square(values - mean) @ weights / total))
    median, p90, p99 = weighted_percentiles(values, weights, (50, 90, 99))
    return Distribution(mean, std, float(median), float(p90), float(p99))


# --------------------------------------------------------------------------------------------------------- one run


def run_metrics(record: RunRecord, fleet: Fleet, slo: SloSpec | None) -> list[Row]:
    """Return one row per expert and, first, one for ``all``, with the columns of ``replication_columns``.

    ``sent``, ``completed``, ``failed`` and ``in_flight`` count the whole run; every other figure is of the measured
    window: ``measured`` requests completed in it. Throughputs are per second of the window. ``request_goodput`` counts
    requests that meet every bound of the SLO, and ``good_share`` is their share of the requests that completed or
    failed in the window (both NaN without an SLO). Requests that no expert was chosen for count in ``all`` only.
    """
    requests = record.requests
    experts = len(fleet.experts)
    expert_of = requests["expert_index"]
    measured = np.flatnonzero(completed_in_window(record))
    # One stable sort makes every expert a slice, so that no column is scanned once per expert.
    measured = measured[np.argsort(expert_of[measured], kind="stable")]
    edges = np.searchsorted(expert_of[measured], np.arange(experts + 1))
    values = _derive({name: column[measured] for name, column in requests.items()}, fleet, slo)

    status = np.asarray(requests["status"], dtype=np.int64)
    counts = np.bincount((expert_of.astype(np.int64) + 1) * len(STATUSES) + status, minlength=(experts + 1) * 3)
    counts = counts.reshape(experts + 1, len(STATUSES))
    failures = np.bincount(expert_of[failed_in_window(record)].astype(np.int64) + 1, minlength=experts + 1)
    gaps = _gap_distributions(record.gaps, experts)

    rows = []
    for index in range(-1, experts):
        whole = index == -1
        chosen = fleet.experts if whole else fleet.experts[index : index + 1]
        replicas = [replica for replica in record.replicas if whole or replica.expert_index == index]
        part = slice(None) if whole else slice(edges[index], edges[index + 1])
        count = counts.sum(axis=0) if whole else counts[index + 1]
        row: Row = {
            "fleet": record.fleet,
            **load_columns(record),
            "expert": ALL_EXPERTS if whole else record.expert_names[index],
            "replication": record.replication,
            "sent": int(count.sum()),
            **dict(zip(STATUSES, count.tolist(), strict=True)),
            "measured": len(values["ttft"][part]),
            "preemptions": sum(replica.preemptions for replica in replicas),
        }
        failed = int(failures.sum() if whole else failures[index + 1])
        row |= _throughputs({name: column[part] for name, column in values.items()}, failed, record, slo)
        row |= _latencies({name: column[part] for name, column in values.items()}, gaps[index])
        row |= _engine_averages(replicas)
        row["router_utilization"] = record.router.utilization if whole and record.router else np.nan
        row["misrouted_share"] = distribution(values["misrouted"][part]).mean
        row |= _costs(chosen, row["output_throughput"])
        rows.append(row)
    return rows


def load_columns(record: RunRecord) -> Row:
    """Return the load under the name that fits its kind; the other name, and both for a trace, are NaN."""
    return {
        "load_kind": record.load_kind,
        "users": record.load if record.load_kind == "closed_loop" else np.nan,
        "rate_rps": record.load if record.load_kind == "open_loop" else np.nan,
    }


def replication_columns() -> tuple[str, ...]:
    """Return the columns of a row of ``run_metrics`` in order: identity, counts, throughputs, latencies, the rest."""
    latencies = tuple(f"{name}_{metric}_ms" for metric in LATENCIES for name in ("mean", "median", "p90", "p99"))
    waits = tuple(f"{name}_{metric}_ms" for metric in WAITS for name in ("mean", "p99"))
    engine = ("utilization", "front_end_utilization", "batch_size", "running", "waiting", "kv_usage", "kv_usage_max")
    return (
        *("fleet", *LOAD_COLUMNS, "expert", "replication"),
        *(*COUNTS, *THROUGHPUTS, *latencies, *waits, *engine, "iteration_error"),
        *("router_utilization", "misrouted_share", *CONSTANTS, "cost_per_million_output_tokens"),
    )


def _derive(requests: Requests, fleet: Fleet, slo: SloSpec | None) -> dict[str, Floats]:
    """Every per-request value the rows are made of, in seconds and tokens, for requests that completed."""
    values = {"ttft": ttft_s(requests), "tpot": tpot_s(requests), "e2el": e2el_s(requests), **wait_s(requests, fleet)}
    values["prompt_tokens"] = requests["prompt_tokens"].astype(np.float64)
    values["output_tokens"] = requests["output_tokens"].astype(np.float64)
    misrouted = (requests["routed_class_index"] != requests["class_index"]).astype(np.float64)
    told = (requests["routed_class_index"] >= 0) & (fleet.router is not None)
    values["misrouted"] = np.where(told, misrouted, np.nan)
    if slo is not None:
        values["good"] = meets_slo(values["ttft"], values["tpot"], values["e2el"], slo).astype(np.float64)
    return values


def _throughputs(values: Mapping[str, Floats], failed: int, record: RunRecord, slo: SloSpec | None) -> Row:
    window_s = record.window_s[1] - record.window_s[0]
    rate = 1 / window_s if window_s > 0 else np.nan
    measured = len(values["ttft"])
    good = float(values["good"].sum()) if slo is not None else np.nan
    output_tokens = float(values["output_tokens"].sum())
    return {
        "request_throughput": measured * rate,
        "output_throughput": output_tokens * rate,
        "total_token_throughput": (output_tokens + float(values["prompt_tokens"].sum())) * rate,
        "request_goodput": good * rate,
        "good_share": good / (measured + failed) if measured + failed else np.nan,
    }


def _latencies(values: Mapping[str, Floats], gaps_s: Distribution) -> Row:
    row: Row = {}
    for metric in LATENCIES:
        spread_s = gaps_s if metric == "itl" else distribution(values[metric])
        row |= {f"{name}_{metric}_ms": getattr(spread_s, name) * 1e3 for name in ("mean", "median", "p90", "p99")}
    for metric in WAITS:
        known = values[metric][~np.isnan(values[metric])]
        row[f"mean_{metric}_ms"] = _mean(known) * 1e3
        row[f"p99_{metric}_ms"] = float(np.percentile(known, 99)) * 1e3 if len(known) else np.nan
    return row


def _engine_averages(replicas: Sequence[ReplicaStats]) -> Row:
    """Averages over replicas: sums of requests, the batch weighted by busy time, plain means of shares."""
    busy = np.array([replica.utilization for replica in replicas])
    batch = np.array([replica.batch_size for replica in replicas])
    # An idle replica has no batch size and no weight.
    ran = busy > 0
    return {
        "utilization": _mean(busy),
        "front_end_utilization": _mean(np.array([replica.front_end_utilization for replica in replicas])),
        "batch_size": float(np.average(batch[ran], weights=busy[ran])) if ran.any() else np.nan,
        "running": float(sum(replica.running for replica in replicas)),
        "waiting": float(sum(replica.waiting for replica in replicas)),
        "kv_usage": _mean(np.array([replica.kv_usage for replica in replicas])),
        "kv_usage_max": max((replica.kv_usage_max for replica in replicas), default=np.nan),
        # Of the replica whose prediction is worst; of none when one of them is not known.
        "iteration_error": float(np.max([replica.iteration_error for replica in replicas], initial=-np.inf))
        if replicas
        else np.nan,
    }


def _costs(experts: Sequence[Expert], output_throughput: float) -> Row:
    prices = [np.nan if expert.price_per_hour is None else expert.price_per_hour for expert in experts]
    per_hour = float(sum(prices))
    tokens_per_hour = output_throughput * 3600
    return {
        "gpus": sum(expert.gpus for expert in experts),
        "cost_per_hour": per_hour,
        "cost_per_million_output_tokens": per_hour / tokens_per_hour * 1e6 if tokens_per_hour > 0 else np.nan,
    }


def _gap_distributions(gaps: TokenGaps, experts: int) -> dict[int, Distribution]:
    """Distribution of the gaps of each expert, and of all of them under -1."""
    order = np.argsort(gaps.gap_s)
    gap_s, weight, expert_of = gaps.gap_s[order], gaps.weight[order], gaps.expert_index[order]
    found = {-1: _sorted_weighted_distribution(gap_s, weight)}
    order = np.argsort(expert_of, kind="stable")
    gap_s, weight = gap_s[order], weight[order]
    edges = np.searchsorted(expert_of[order], np.arange(experts + 1))
    for index in range(experts):
        part = slice(edges[index], edges[index + 1])
        found[index] = _sorted_weighted_distribution(gap_s[part], weight[part])
    return found


def _times(requests: Requests, name: str) -> Floats:
    return np.asarray(requests[name], dtype=np.float64)


def _in_window(time_s: Floats, record: RunRecord) -> NDArray[np.bool_]:
    start_s, end_s = record.window_s
    return np.asarray((time_s > start_s) & (time_s <= end_s))


def _without_rounding(duration_s: Floats) -> Floats:
    """Make a duration that is zero but for rounding exactly zero; a truly negative one stays, to be seen."""
    return np.where(np.abs(duration_s) < ROUNDING_S, 0.0, duration_s)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else np.nan
