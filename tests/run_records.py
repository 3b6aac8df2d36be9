"""Made-up fleets and run records for tests of everything downstream of the simulation."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sim.fleet import EngineSettings, Expert, Fleet, FrontEnd
from sim.records import COMPLETED, FAILED, IN_FLIGHT, REQUEST_COLUMNS, ReplicaStats, RouterStats, RunRecord, TokenGaps
from sim.result import Result
from sim.service_curve import CurveSource, DecodePiece, IterationWork
from sim.spec import FleetFile, RouterSpec, SloSpec

ENGINE = EngineSettings(
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    max_model_len=8192,
    block_size=16,
    num_kv_blocks=20_000,
    enable_prefix_caching=True,
    scheduler_reserve_full_isl=True,
    async_scheduling=True,
)


@dataclass(frozen=True)
class ConstantCurve:
    """Every iteration takes the same time."""

    iteration: float = 0.02

    @property
    def source(self) -> CurveSource:
        return CurveSource(label="roofline, not calibrated", detail="a made-up curve")

    def iteration_s(self, work: IterationWork) -> float:
        return self.iteration

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        return DecodePiece(self.iteration, 0.0, np.inf)


def make_fleet(
    name: str = "8 x 8B", experts: int = 2, *, router: bool = True, price_per_hour: float | None = 2.0
) -> Fleet:
    return Fleet(
        name=name,
        router=RouterSpec(user_network_s=0.001, expert_network_s=0.0005) if router else None,
        experts=tuple(
            Expert(
                name=f"expert-{index}",
                model="llama-3-8b",
                quantization="bf16",
                gpu="H100-SXM",
                tensor_parallel_size=1,
                replicas=1,
                engine=ENGINE,
                front_end=FrontEnd(per_request_s=1e-3, per_prompt_token_s=1e-6, per_output_token_s=2e-5),
                curve=ConstantCurve(),
                gpus=1,
                price_per_hour=price_per_hour,
            )
            for index in range(experts)
        ),
        class_map=tuple((index,) for index in range(experts)),
    )


def make_requests(count: int = 0, **columns: object) -> dict[str, NDArray[np.generic]]:
    """Request columns with the dtypes of REQUEST_COLUMNS; times not given are NaN, counts 0."""
    missing = {name: np.nan if dtype == "float64" else 0 for name, dtype in REQUEST_COLUMNS.items()}
    return {
        name: np.full(count, columns.get(name, missing[name]), dtype=dtype) for name, dtype in REQUEST_COLUMNS.items()
    }


def make_gaps(expert_index: object = (), gap_s: object = (), weight: object = ()) -> TokenGaps:
    return TokenGaps(
        expert_index=np.array(expert_index, dtype=np.int16),
        gap_s=np.array(gap_s, dtype=np.float64),
        weight=np.array(weight, dtype=np.int64),
    )


REPLICA = ReplicaStats(
    expert_index=0,
    replica_index=0,
    utilization=0.5,
    batch_size=10.0,
    running=5.0,
    waiting=1.0,
    kv_usage=0.25,
    kv_usage_max=0.5,
    front_end_utilization=0.1,
    preemptions=0,
    iterations=100,
)


def make_run(
    fleet: Fleet,
    load: float = 100,
    replication: int = 0,
    *,
    load_kind: str = "closed_loop",
    requests: int = 400,
    slowness: float = 1.0,
    notes: tuple[str, ...] = (),
) -> RunRecord:
    """A plausible run: latencies grow with the load, a few requests fail and the last few stay in flight."""
    rng = np.random.default_rng([replication, int(0 if np.isnan(load) else load), len(fleet.experts), requests])
    experts = len(fleet.experts)
    pressure = slowness * (1 + (0 if np.isnan(load) else load) / 100)
    sent = np.sort(rng.uniform(0, 100, requests))
    expert = rng.integers(0, experts, requests)
    output = rng.integers(1, 257, requests)
    status = np.full(requests, COMPLETED)
    status[rng.random(requests) < 0.01] = FAILED
    status[-3:] = IN_FLIGHT
    reached = status == COMPLETED
    router_start = sent + 0.001 + rng.exponential(0.0001, requests)
    router_end = router_start + 0.0002
    front_end = router_end + 0.0005 + rng.exponential(0.0002, requests)
    engine = front_end + 0.001
    scheduled = engine + rng.exponential(0.002 * pressure, requests)
    first_engine = scheduled + 0.03 * pressure
    step = 0.01 * (0.5 + 0.5 * pressure) * rng.uniform(0.9, 1.1, requests)
    last_engine = first_engine + step * (output - 1)
    steps = np.where(reached, output - 1, 0)
    columns: dict[str, object] = {
        "request_id": np.arange(requests),
        "user_id": np.arange(requests) % max(1, int(0 if np.isnan(load) else load)),
        "class_index": expert,
        "routed_class_index": np.where(rng.random(requests) < 0.05, (expert + 1) % experts, expert),
        "expert_index": expert,
        "prompt_tokens": rng.integers(50, 1000, requests),
        "output_tokens": np.where(reached, output, 0),
        "sent_s": sent,
        "router_start_s": router_start if fleet.router else np.nan,
        "router_end_s": router_end if fleet.router else np.nan,
        "front_end_start_s": front_end,
        "engine_arrival_s": engine,
        "scheduled_s": np.where(reached, scheduled, np.nan),
        "first_token_engine_s": np.where(reached, first_engine, np.nan),
        "first_token_s": np.where(reached, first_engine + 0.001, np.nan),
        "last_token_engine_s": np.where(reached, last_engine, np.nan),
        "last_token_s": np.where(reached, last_engine + 0.001, np.nan),
        "status": status,
    }
    return RunRecord(
        fleet=fleet.name,
        load_kind=load_kind,
        load=load,
        replication=replication,
        expert_names=tuple(expert.name for expert in fleet.experts),
        class_names=tuple(f"class-{index}" for index in range(experts)),
        requests=make_requests(requests, **columns),
        gaps=make_gaps(expert[steps > 0], step[steps > 0], steps[steps > 0]),
        window_s=(0.0, 150.0),
        replicas=tuple(
            replace(REPLICA, expert_index=index, utilization=min(1.0, pressure / 10)) for index in range(experts)
        ),
        router=RouterStats(utilization=0.1, requests=0.01) if fleet.router else None,
        notes=notes,
    )


def make_file(fleets: list[Fleet], *, slo: SloSpec | None = None, load: dict[str, object] | None = None) -> FleetFile:
    expert = {"model": "llama-3-8b", "gpu": "H100-SXM"}
    return FleetFile.model_validate(
        {
            "name": "made up",
            "workload": {
                "classes": {"class-0": {"prompt_tokens": 512, "output_tokens": 128}},
                "load": load or {"kind": "closed_loop", "users": [1, 100]},
            },
            "fleets": {
                fleet.name: {"router": {} if fleet.router else None, "experts": {e.name: expert for e in fleet.experts}}
                for fleet in fleets
            },
            "slo": slo,
        }
    )


def make_result(
    loads: tuple[float, ...] = (1, 100),
    *,
    fleets: int = 2,
    load_kind: str = "closed_loop",
    replications: int = 2,
    requests: int = 120,
    slo: SloSpec | None = None,
    notes: tuple[str, ...] = (),
    interrupted: bool = False,
) -> Result:
    """A result of ``fleets`` fleets with a router and two experts; the last one, where there are two, is a baseline."""
    made = [make_fleet(f"fleet {index}", 2) for index in range(fleets)]
    if fleets > 1:
        made[-1] = make_fleet("baseline", 1, router=False)
    runs = [
        make_run(fleet, load, k, load_kind=load_kind, requests=requests, slowness=1 + place, notes=notes)
        for place, fleet in enumerate(made)
        for load in loads
        for k in range(replications)
    ]
    kinds: dict[str, dict[str, object]] = {
        "closed_loop": {"kind": "closed_loop", "users": [int(load) for load in loads if load == load] or 1},
        "open_loop": {"kind": "open_loop", "rate_rps": list(loads)},
        "trace": {"kind": "trace", "file": "trace.csv", "format": "azure"},
    }
    return Result(
        file=make_file(made, slo=slo, load=kinds[load_kind]),
        fleets={fleet.name: fleet for fleet in made},
        runs=runs,
        version="0.1.0",
        interrupted=interrupted,
    )
