from dataclasses import replace
from math import nan

import numpy as np
import pytest

from calibrate.predictor import CannotPredictError
from calibrate.tables.measured_runs import MeasuredRequests, MeasuredRun
from calibrate.validate.replay import LIGHT, NEAR_SATURATION, OVERLOADED, replay
from sim.fleet import EngineSettings, Expert, Fleet
from sim.metrics import e2el_s, ttft_s
from sim.records import RunRecord
from sim.simulation import RunPlan, Simulation
from sim.spec import ClassSpec, Fixed, OpenLoop, RunSpec, WorkloadSpec
from tests.fleets import AffineCurve
from tests.measured_tables import engine_of, run_of

CURVE = AffineCurve(fixed_s=0.008, per_request_s=1e-4, per_prefill_token_s=2e-5, per_kv_token_s=1e-9)
CYCLIC = "inference-perf shared_prefix with 100 distinct prompts sent cyclically"


def recorded(record: RunRecord) -> MeasuredRequests:
    columns = record.requests
    return MeasuredRequests(
        arrival_s=columns["sent_s"],
        prompt_tokens=columns["prompt_tokens"].astype(np.int64),
        output_tokens=columns["output_tokens"].astype(np.int64),
        ttft_s=ttft_s(columns),
        e2e_s=e2el_s(columns),
        engine_queue_s=np.full(len(columns["sent_s"]), nan),
        completed=columns["status"] == 0,
    )


def simulated() -> tuple[MeasuredRun, MeasuredRequests]:
    """Return a run of the engine of ``run_of`` simulated by hand, as if it had been measured."""
    engine = engine_of(CURVE)
    settings = EngineSettings(
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        max_model_len=4096,
        block_size=16,
        num_kv_blocks=20_000,
        enable_prefix_caching=True,
        scheduler_reserve_full_isl=True,
        async_scheduling=True,
    )
    expert = Expert(
        name="e",
        model="llama-3.1-8b",
        quantization="bf16",
        gpu="H100-SXM",
        tensor_parallel_size=1,
        replicas=1,
        engine=settings,
        front_end=engine.front_end,
        curve=engine.curve,
        gpus=1,
        price_per_hour=None,
    )
    lengths = ClassSpec(prompt_tokens=Fixed(value=600), output_tokens=Fixed(value=100))
    workload = WorkloadSpec(classes={"all": lengths}, load=OpenLoop(rate_rps=5.0))
    plan = RunPlan(
        fleet=Fleet(name="f", router=None, experts=(expert,), class_map=((0,),)),
        workload=workload,
        run=RunSpec(requests=2000, warm_up_requests=0),
        load=5.0,
    )
    requests = recorded(Simulation(plan).run())
    whole = requests.completed
    kept = MeasuredRequests(**{name: getattr(requests, name)[whole] for name in MeasuredRequests.__slots__})
    run = run_of(n_requests=len(kept), prompt_tokens_std=0.0)
    return run, kept


def test_a_run_with_recorded_requests_replays_to_itself() -> None:
    run, requests = simulated()
    found = replay(run, requests, engine_of(CURVE)).figures
    # All but the last requests, which another few were in flight beside when the first simulation ended.
    assert found["ttft_mean"] == pytest.approx(requests.ttft_s.mean(), rel=0.005)
    assert found["e2e_mean"] == pytest.approx(requests.e2e_s.mean(), rel=0.005)
    assert found["e2e_p99"] == pytest.approx(np.percentile(requests.e2e_s, 99), rel=0.005)


def test_a_run_stated_by_its_rate_replays_to_itself_within_noise() -> None:
    run, requests = simulated()
    found = replay(run, None, engine_of(CURVE), replications=5).figures
    assert found["ttft_mean"] == pytest.approx(requests.ttft_s.mean(), rel=0.03)
    assert found["e2e_mean"] == pytest.approx(requests.e2e_s.mean(), rel=0.03)


def test_a_replay_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = (replay(run_of(), None, engine_of(CURVE), seed=seed).figures for seed in (1, 1, 2))
    assert first == again
    assert first["ttft_mean"] != other["ttft_mean"]


def test_repeated_prompts_are_cheap_and_cheapest_with_a_warm_cache() -> None:
    without = replay(run_of(), None, engine_of(CURVE)).figures["ttft_mean"]
    cold = replay(run_of(prefix_note=CYCLIC), None, engine_of(CURVE)).figures["ttft_mean"]
    warm = replay(run_of(prefix_note=CYCLIC, stage=1), None, engine_of(CURVE)).figures["ttft_mean"]
    assert warm < cold < without
    # 100 of 400 prompts are computed by the cold engine, every one by an engine without repeats; 600 tokens are 12 ms.
    assert cold - warm == pytest.approx(0.25 * (without - warm), rel=0.35)
    assert without - warm > 0.009


def test_prompts_are_computed_where_prefix_caching_is_off() -> None:
    equal = run_of(prompt_tokens_std=0.0, prefix_caching=False)
    repeated = replace(equal, prefix_note=CYCLIC)
    assert replay(repeated, None, engine_of(CURVE)).figures == replay(equal, None, engine_of(CURVE)).figures


def test_a_stated_shared_prefix_is_computed_once() -> None:
    shared = replay(run_of(shared_prefix_tokens=400), None, engine_of(CURVE)).figures["ttft_mean"]
    without = replay(run_of(), None, engine_of(CURVE)).figures["ttft_mean"]
    assert without - shared == pytest.approx(400 * CURVE.per_prefill_token_s, rel=0.3)


def test_a_closed_loop_obeys_littles_law() -> None:
    run = run_of(load_type="closed_loop", concurrency_limit=16, rate_rps=nan, stage=1, n_requests=2000)
    figures = replay(run, None, engine_of(CURVE)).figures
    # Users who send again at once are always in the system: users = throughput * time in the system.
    assert figures["output_throughput"] / 100 * figures["e2e_mean"] == pytest.approx(16, rel=0.02)


def test_a_saturated_engine_keeps_its_batch_full() -> None:
    run = run_of(load_type="saturated_closed_loop", max_num_seqs=32, n_requests=None, prompt_tokens_mean=nan)
    found = replay(run, None, engine_of(AffineCurve(fixed_s=0.008, per_request_s=1e-4)))
    assert found.regime == NEAR_SATURATION
    assert found.figures["itl_p50"] == pytest.approx(0.008 + 32 * 1e-4, rel=0.01)
    assert found.figures["output_throughput"] == pytest.approx(32 / found.figures["itl_mean"], rel=0.05)
    assert any("prompts assumed" in note for note in found.notes)


def test_a_burst_arrives_at_once() -> None:
    run = run_of(load_type="burst", rate_rps=nan, n_requests=128, prompt_tokens_std=0.0)
    found = replay(run, None, engine_of(CURVE))
    # 128 prompts of 600 tokens within 2,048 tokens an iteration take 38 iterations.
    assert found.figures["ttft_p99"] > 30 * (CURVE.fixed_s + 2048 * CURVE.per_prefill_token_s)


def test_regimes_follow_the_load() -> None:
    regimes = [
        replay(run_of(rate_rps=rate, n_requests=600), None, engine_of(CURVE), replications=1).regime
        for rate in (0.5, 80.0)
    ]
    assert regimes == [LIGHT, OVERLOADED]


def test_times_taken_in_the_engine_have_no_front_end() -> None:
    run, requests = simulated()
    inside = MeasuredRequests(
        **{name: getattr(requests, name) for name in MeasuredRequests.__slots__ if name != "engine_queue_s"},
        engine_queue_s=np.zeros(len(requests)),
    )
    slow = engine_of(CURVE, per_request_s=0.01)
    assert replay(run, inside, slow).figures == replay(run, requests, engine_of(CURVE)).figures
    assert replay(run, requests, slow).figures["ttft_mean"] > requests.ttft_s.mean() + 0.009


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gpu": "abacus"}, "unknown GPU 'abacus'"),
        ({"model": "megatron-900b"}, "unknown model 'megatron-900b'"),
        ({"rate_rps": nan}, "rate_rps"),
        ({"prompt_tokens_mean": nan}, "in_len_mean"),
        ({"n_requests": None}, "n_requests"),
        ({"dp": 2}, "data parallel"),
        ({"model": "llama-3.1-70b", "kv_blocks": None}, "does not fit"),
        ({"load_type": "closed_loop"}, "concurrency_limit"),
    ],
)
def test_what_cannot_be_predicted_says_why(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(CannotPredictError, match=reason):
        replay(run_of(**fields), None, engine_of(CURVE))
