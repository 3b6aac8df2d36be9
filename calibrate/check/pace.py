"""How long the engines' iterations took beside what their curves say of the very same batches.

It separates a wrong clock from a wrong queue. Where an engine's pace is 1.06, the machine was that much slower than
when it was calibrated, or the curve is that wrong; predicted again at that pace, what is left of an error is the
model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.check.comparison import is_load
from calibrate.measure.iteration_records import SentRequest, admissions, reconstruct
from real.experts.iteration_log import IterationLine
from sim.fleet import Expert
from sim.records import RunRecord
from sim.service_curve import IterationWork

FEWEST_ITERATIONS = 20
"""Of a replica in one run, below which its pace is not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """One expert's iterations at one load, over its replicas and the repeated runs.

    Attributes:
        pace: their time as a multiple of the curve's for the same batches.
        low, high: the same of the fastest and of the slowest run.
        iterations: how many there are whose batch is known.
        known: they are so many of all, as a share.
    """

    load: float
    expert: str
    pace: float
    low: float
    high: float
    iterations: int
    known: float


def paces(
    experts: Sequence[Expert],
    runs: Sequence[RunRecord],
    lines: Mapping[tuple[int, int], Sequence[IterationLine]],
) -> list[Pace]:
    """Return every expert's pace at every load, as far as the logs tell.

    Args:
        experts: of the fleet, with the curves that predict.
        runs: every real run, of all loads and repeats.
        lines: (expert index, replica index) -> what its engine logged in all of them.
    """
    ordered = sorted(runs, key=lambda run: run.began_monotonic_s)
    sums: dict[tuple[float, int], list[tuple[float, float, int, int]]] = {}
    for run in ordered:
        end_s = run.began_monotonic_s + run.window_s[1]  # afterwards the engines may be measured again
        for index, expert in enumerate(experts):
            of_replicas = []
            for (at, replica), logged in lines.items():
                if at == index:
                    within = [line for line in logged if run.began_monotonic_s <= line.ended_s <= end_s]
                    of_replicas.append(_times(expert, run, index, replica, within))
            took_s, curve_s, used, seen = np.sum(of_replicas, axis=0) if of_replicas else (0.0, 0.0, 0, 0)
            if used >= FEWEST_ITERATIONS:
                sums.setdefault((run.load, index), []).append((float(took_s), float(curve_s), int(used), int(seen)))
    found = []
    for (load, index), rows in sorted(sums.items()):
        took, curve, used, seen = (sum(row[place] for row in rows) for place in range(4))
        each = [row[0] / row[1] for row in rows]
        found.append(
            Pace(
                load=load,
                expert=experts[index].name,
                pace=took / curve,
                low=min(each),
                high=max(each),
                iterations=int(used),
                known=used / seen,
            )
        )
    return found


def _times(
    expert: Expert, run: RunRecord, index: int, replica: int, lines: Sequence[IterationLine]
) -> tuple[float, float, int, int]:
    """Seconds that iterations took, seconds that the curve says, how many of them, and how many there were in all."""
    rows = run.requests
    mine = np.flatnonzero((rows["expert_index"] == index) & (rows["replica_index"] == replica))
    sent = [
        SentRequest(
            point="run",
            number=int(rows["request_id"][at]),
            prompt_tokens=int(rows["prompt_tokens"][at]),
            output_tokens=int(rows["output_tokens"][at]),
            sent_s=float(rows["sent_s"][at]) + run.began_monotonic_s,
            first_token_s=float(rows["first_token_s"][at]) + run.began_monotonic_s,
        )
        for at in mine
    ]
    if not sent or not lines:
        return 0.0, 0.0, 0, len(lines)
    records = reconstruct(lines, sent, expert.engine, "run")
    usable = records["matched"] & (records["cycle_s"] > 0)
    works = records.loc[usable, [*IterationWork._fields]].itertuples(index=False, name=None)
    curve_s = sum(expert.curve.iteration_s(IterationWork(*work)) for work in works)
    took_s = float(records.loc[usable, "cycle_s"].sum())
    if expert.front_end.per_request_engine_s:  # not the engine's own work
        admitted = [number for number in admissions(lines, sent, expert.engine) if number is not None]
        took_s -= expert.front_end.per_request_engine_s * int(usable.to_numpy()[admitted].sum())
    return took_s, curve_s, int(usable.sum()), int((records["cycle_s"] > 0).sum())


def factors(found: Sequence[Pace], load: float) -> dict[str, float]:
    """Return expert -> pace at one load."""
    return {each.expert: each.pace for each in found if is_load(each.load, load)}
