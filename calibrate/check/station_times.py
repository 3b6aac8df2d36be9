"""Where a request's time goes, simulated and measured: which station a wrong prediction comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from sim.metrics import completed_in_window
from sim.records import RunRecord
from sim.spec import ALL_EXPERTS

REST = "network and delivery"
STATIONS = ("router", "front end and queue", "prefill", "decode", REST)
"""Front end and queue: from when the server begins with a request until its first scheduling; a real engine takes
requests in between iterations and counts its queue from then on, so the two cannot be told apart. The last is what the
others leave of a request's end-to-end time, waiting to be taken up by the server included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StationTime:
    """Mean seconds of a request at one station; NaN where a side cannot know."""

    load: float
    expert: str
    station: str
    simulated_s: float
    measured_s: float


def station_times(simulated: Sequence[RunRecord], measured: Sequence[RunRecord]) -> list[StationTime]:
    """Return the times of the fleet and of each expert at one load, as means over the runs.

    Simulated times come from the timestamps of each request; measured ones of the router from the gateway's headers and
    those inside the engine from its own sums (vLLM's ``request_prefill_time_seconds`` and
    ``request_decode_time_seconds``, whose prefill lasts from the first scheduling to the first token, as here, and
    ``e2e_request_latency_seconds``).
    """
    names = (ALL_EXPERTS, *simulated[0].expert_names)
    rows = []
    for index, name in enumerate(names, start=-1):
        ours = [_from_timestamps(record, index) for record in simulated]
        theirs = [_from_engines(record, index) for record in measured]
        rows += [
            StationTime(
                load=simulated[0].load,
                expert=name,
                station=station,
                simulated_s=float(np.mean([each[station] for each in ours])),
                measured_s=float(np.mean([each[station] for each in theirs])) if theirs else nan,
            )
            for station in STATIONS
        ]
    return rows


def _chosen(record: RunRecord, expert_index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    chosen = completed_in_window(record)
    return chosen if expert_index < 0 else chosen & (record.requests["expert_index"] == expert_index)


def _between(record: RunRecord, expert_index: int, start: str, end: str) -> float:
    seconds = (record.requests[end] - record.requests[start])[_chosen(record, expert_index)]
    return float(seconds.mean()) if len(seconds) else nan


def _from_timestamps(record: RunRecord, index: int) -> dict[str, float]:
    routed = record.router is not None
    times = {
        "router": _between(record, index, "sent_s", "router_end_s") if routed else 0.0,
        "front end and queue": _between(record, index, "front_end_start_s", "scheduled_s"),
        "prefill": _between(record, index, "scheduled_s", "first_token_engine_s"),
        "decode": _between(record, index, "first_token_engine_s", "last_token_engine_s"),
    }
    return _with_rest(times, _between(record, index, "sent_s", "last_token_s"))


def _from_engines(record: RunRecord, index: int) -> dict[str, float]:
    replicas = [replica for replica in record.replicas if index < 0 or replica.expert_index == index]
    weights = [replica.engine_requests for replica in replicas]

    def mean(values: list[float]) -> float:
        return float(np.average(values, weights=weights)) if sum(weights) > 0 else nan

    routed = record.router is not None
    prefill_s, decode_s = (
        mean([getattr(each, f"engine_{what}_s") for each in replicas]) for what in ("prefill", "decode")
    )
    times = {
        "router": _between(record, index, "sent_s", "router_end_s") if routed else 0.0,
        "front end and queue": mean([replica.engine_e2e_s for replica in replicas]) - prefill_s - decode_s,
        "prefill": prefill_s,
        "decode": decode_s,
    }
    return _with_rest(times, _between(record, index, "sent_s", "last_token_s"))


def _with_rest(times: dict[str, float], end_to_end_s: float) -> dict[str, float]:
    return {**times, REST: end_to_end_s - sum(times.values())}
