"""A measured run simulated again: the same engine under the same load, and the figures that were measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibrate.predictor import PredictedEngine
from calibrate.tables.measured_runs import METRICS, MeasuredRequests, MeasuredRun
from calibrate.tables.run_engine import RunEngine, run_engine
from calibrate.validate.replay_load import ReplayLoad, replay_load
from sim.fleet import Expert, Fleet, FrontEnd
from sim.metrics import completed_in_window, distribution, e2el_s, tpot_s, ttft_s, wait_s, weighted_distribution
from sim.records import RunRecord
from sim.service_curve import IterationWork, ServiceCurve
from sim.simulation import RunPlan, Simulation
from sim.streams import stream

LIGHT, LOADED, NEAR_SATURATION, OVERLOADED = REGIMES = ("light", "loaded", "near saturation", "overloaded")

LIGHT_STRETCH = 1.25
NEAR_SATURATION_OCCUPANCY = 0.7
NEAR_SATURATION_QUEUE_SHARE = 0.05
OVERLOADED_QUEUE_SHARE = 0.25
FULL_OCCUPANCY = 0.95

REGIME_RULES = (
    "Occupancy is the time mean of the share of `max_num_seqs` or of the KV blocks in use, whichever is larger."
    " Overloaded: requests spend more than a quarter of their end-to-end time in the engine's queue; in a closed "
    "loop that is saturated on purpose: KV memory or the front end keeps the batch below its limit. Near "
    "saturation: occupancy from 0.7 on, or more than a twentieth of the end-to-end time in the queue, or "
    "saturated on purpose. Light: time per output token is less than 1.25 times that of a request alone in the "
    "engine. Loaded: the rest."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What came of a replay.

    Attributes:
        figures: by the names of ``METRICS``; seconds and tokens per second, NaN where undefined.
        regime: by ``REGIME_RULES``; of the first replication.
        occupancy: time-mean share of the scarcer of slots and KV blocks, likewise.
        range_widening: factor on the width of its intervals for work beyond the curve's fitted range, likewise.
        notes: what was assumed beyond the row.
    """

    figures: Mapping[str, float]
    regime: str
    occupancy: float
    range_widening: float
    notes: tuple[str, ...]


def replay(
    run: MeasuredRun,
    requests: MeasuredRequests | None,
    engine: PredictedEngine,
    *,
    seed: int = 1,
    replications: int = 3,
) -> Replay:
    """Simulate a run and return its figures, means over the replications.

    Recorded arrivals and lengths leave nothing to chance and are replayed once. Times taken inside the engine (requests
    with ``engine_queue_s``) are held to an engine without a front end.

    Raises:
        CannotPredictError: the engine is not in the catalogue, or the row does not say what was sent.
    """
    settings = run_engine(run)
    front_end = engine.front_end
    notes = list(settings.notes)
    if requests is not None and np.isfinite(requests.engine_queue_s).any():
        front_end = FrontEnd(per_request_s=0.0, per_prompt_token_s=0.0, per_output_token_s=0.0)
        notes.append("times taken inside the engine: no front end")
    fleet = _fleet(run, settings, engine, front_end)
    figures: list[dict[str, float]] = []
    regime, occupancy, widening = "", 0.0, 1.0
    for replication in range(replications):
        drawn = int(stream(seed, "replication", replication).integers(2**62))
        load = replay_load(run, requests, settings, engine.curve, drawn)
        plan = RunPlan(fleet=fleet, workload=load.workload, run=load.run, data=load.data, load=load.load)
        record = Simulation(plan).run()
        figures.append(_figures(record, load))
        if not replication:
            regime, occupancy = load_regime(run, record, fleet, engine.curve)
            widening = record.replicas[0].range_widening
            notes += [*load.notes, *record.notes]
        if not load.random:
            break
    means = {name: float(np.mean([each[name] for each in figures])) for name in METRICS}
    return Replay(
        figures=means,
        regime=regime,
        occupancy=occupancy,
        range_widening=widening,
        notes=tuple(dict.fromkeys(notes)),
    )


def load_regime(run: MeasuredRun, record: RunRecord, fleet: Fleet, curve: ServiceCurve) -> tuple[str, float]:
    """Return the regime of a simulated run, by ``REGIME_RULES``, and its occupancy."""
    (stats,) = record.replicas
    settings = fleet.experts[0].engine
    slots = stats.running / settings.max_num_seqs
    occupancy = max(slots, stats.kv_usage)
    done = {name: column[completed_in_window(record)] for name, column in record.requests.items()}
    if run.load_type == "saturated_closed_loop":
        return (NEAR_SATURATION if slots >= FULL_OCCUPANCY else OVERLOADED), occupancy
    queue_share = np.mean(wait_s(done, fleet)["engine_queue"]) / np.mean(e2el_s(done))
    if queue_share > OVERLOADED_QUEUE_SHARE:
        return OVERLOADED, occupancy
    if occupancy >= NEAR_SATURATION_OCCUPANCY or queue_share > NEAR_SATURATION_QUEUE_SHARE:
        return NEAR_SATURATION, occupancy
    context = round(float(np.mean(done["prompt_tokens"] + done["output_tokens"] / 2)))
    alone_s = curve.iteration_s(IterationWork(0, 0, 0.0, 0, 1, context))
    tpot = tpot_s(done)
    stretched = np.isfinite(tpot).any() and np.nanmean(tpot) > LIGHT_STRETCH * alone_s
    return (LOADED if stretched else LIGHT), occupancy


def _fleet(run: MeasuredRun, settings: RunEngine, engine: PredictedEngine, front_end: FrontEnd) -> Fleet:
    expert = Expert(
        name=run.run_id,
        model=settings.model.name,
        quantization=settings.quantization.name,
        gpu=settings.gpu.name,
        tensor_parallel_size=run.tp,
        replicas=1,
        engine=settings.settings(async_scheduling=engine.async_scheduling),
        front_end=front_end,
        curve=engine.curve,
        gpus=run.tp,
        price_per_hour=None,
    )
    return Fleet(name=run.exp, router=None, experts=(expert,), class_map=((0,),))


def _figures(record: RunRecord, load: ReplayLoad) -> dict[str, float]:
    counted = completed_in_window(record) & (record.requests["request_id"] >= load.first_request)
    done = {name: column[counted] for name, column in record.requests.items()}
    spreads = {name: distribution(of(done)) for name, of in (("ttft", ttft_s), ("tpot", tpot_s), ("e2e", e2el_s))}
    spreads["itl"] = weighted_distribution(record.gaps.gap_s, record.gaps.weight)
    figures: dict[str, float] = {}
    for name, spread in spreads.items():
        figures |= {f"{name}_mean": spread.mean, f"{name}_p50": spread.median}
        figures |= {f"{name}_p90": spread.p90, f"{name}_p99": spread.p99}
    start_s, end_s = record.window_s
    if not load.over_window:
        start_s, end_s = done["sent_s"].min(), done["last_token_s"].max()
    figures["output_throughput"] = float(done["output_tokens"].sum()) / (end_s - start_s)
    return figures
