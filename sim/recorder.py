"""Collects what happens in a run and turns it into its record: requests column by column, and gaps between tokens."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.records import COMPLETED, REQUEST_COLUMNS, TokenGaps
from sim.replica import RUN_COLUMNS, Replica
from sim.request import Request

GAP_RESOLUTION_S = 1e-6
OK = 200  # of HTTP
_COLUMNS = REQUEST_COLUMNS | {"first_run": "int64", "last_run": "int64"}
_ROW = np.dtype([(name, np.dtype(dtype).newbyteorder("<")) for name, dtype in _COLUMNS.items()])
_CODES = {"int64": "q", "int32": "i", "int16": "h", "int8": "b", "float64": "d"}
_PACK = struct.Struct("<" + "".join(_CODES[dtype] for dtype in _COLUMNS.values())).pack


class Recorder:
    """Packs one row per request, some 130 bytes, so a million requests stay within 130 MB."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._preempted: list[tuple[int, list[tuple[int, int]], list[float]]] = []

    def add(self, request: Request, status: int) -> None:
        """Record a request that completed, failed, or is still in flight at the end of the run."""
        replica = request.replica
        if request.spans is not None and request.gaps is not None:
            self._preempted.append((len(self._bytes) // _ROW.itemsize, request.spans, request.gaps))
        self._bytes += _PACK(
            request.request_id,
            request.user_id,
            request.class_index,
            request.routed_class_index,
            -1 if replica is None else replica.expert_index,
            -1 if replica is None else replica.replica_index,
            request.prompt_tokens,
            request.output_tokens,
            max(0, request.cached_prompt_tokens),
            request.preemptions,
            request.sent_s,
            request.router_start_s,
            request.router_end_s,
            request.front_end_start_s,
            request.engine_arrival_s,
            request.scheduled_s,
            request.first_token_engine_s,
            request.first_token_s,
            request.last_token_engine_s,
            request.last_token_s,
            status,
            OK if request.failure is None else request.failure.http_status,
            request.first_run,
            request.last_run,
        )

    def _rows(self) -> NDArray[Any]:
        return np.frombuffer(self._bytes, _ROW)

    def requests(self) -> dict[str, NDArray[Any]]:
        """Return the columns of ``REQUEST_COLUMNS`` recorded so far, as copies."""
        rows = self._rows()
        return {name: rows[name].astype(dtype) for name, dtype in REQUEST_COLUMNS.items()}

    def gaps(
        self, columns: dict[str, NDArray[Any]], replicas: Sequence[Replica], window_s: tuple[float, float]
    ) -> TokenGaps:
        """Return the gaps between the tokens of all requests that completed inside the window.

        Each iteration of a run is a gap of every request that decodes in it, so a request adds one to the weights of
        the runs after its first token's up to its last token's. Equal gaps, to the microsecond, are merged.
        """
        last_token_s = columns["last_token_s"]
        measured = (columns["status"] == COMPLETED) & (last_token_s > window_s[0]) & (last_token_s <= window_s[1])
        first_run, last_run = (self._rows()[name].astype(np.int64) for name in ("first_run", "last_run"))
        spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
        across: dict[int, list[float]] = {}
        for row, earlier, gaps in self._preempted:
            if measured[row]:
                place = int(columns["expert_index"][row]), int(columns["replica_index"][row])
                spans.setdefault(place, []).extend(earlier)
                across.setdefault(place[0], []).extend(gaps)

        parts: dict[int, list[tuple[NDArray[np.float64], NDArray[np.int64]]]] = {}
        for replica in replicas:
            place = replica.expert_index, replica.replica_index
            here = measured & (columns["expert_index"] == place[0]) & (columns["replica_index"] == place[1])
            edges = np.zeros(len(replica.runs()) + 1, np.int64)
            np.add.at(edges, first_run[here] + 1, 1)
            np.add.at(edges, last_run[here] + 1, -1)
            for first, last in spans.get(place, ()):
                edges[first + 1] += 1
                edges[last + 1] -= 1
            parts.setdefault(place[0], []).append(_expand(replica, np.cumsum(edges)[:-1]))
        for expert_index, gaps in across.items():
            parts[expert_index].append((np.array(gaps), np.ones(len(gaps), np.int64)))
        merged = [(expert_index, *_merge(found)) for expert_index, found in sorted(parts.items())]
        return TokenGaps(
            expert_index=np.concatenate([np.full(len(gap_s), index, np.int16) for index, gap_s, _ in merged]),
            gap_s=np.concatenate([gap_s for _, gap_s, _ in merged]),
            weight=np.concatenate([weight for _, _, weight in merged]),
        )


def _expand(replica: Replica, weight: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the iterations of a replica's runs that have a weight, one by one."""
    runs = replica.runs()[weight > 0]
    iterations = runs[:, RUN_COLUMNS.index("iterations")].astype(np.int64)
    first_s = np.repeat(runs[:, RUN_COLUMNS.index("first_gap_s")], iterations)
    step_s = np.repeat(runs[:, RUN_COLUMNS.index("gap_step_s")], iterations)
    within = np.arange(iterations.sum()) - np.repeat(np.cumsum(iterations) - iterations, iterations)
    # Where a foreseen delay came out shorter than the one before, the tokens arrive together.
    return np.maximum(first_s + within * step_s, 0.0), np.repeat(weight[weight > 0], iterations)


def _merge(
    parts: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    gap_s = np.concatenate([gaps for gaps, _ in parts])
    weight = np.concatenate([weights for _, weights in parts])
    steps, where = np.unique(np.rint(gap_s / GAP_RESOLUTION_S).astype(np.int64), return_inverse=True)
    return np.asarray(steps * GAP_RESOLUTION_S, np.float64), np.bincount(where, weight, len(steps)).astype(np.int64)
