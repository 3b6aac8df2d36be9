"""Small fleets built by hand, for tests of the simulator itself."""

from dataclasses import dataclass
from math import inf

from sim.fleet import EngineSettings, Expert, Fleet, FrontEnd
from sim.service_curve import CurveSource, DecodePiece, IterationWork
from sim.simulation import RunPlan
from sim.spec import ClassSpec, Fixed, Load, RouterSpec, RunSpec, WorkloadSpec
from sim.traffic import WorkloadData

FREE = FrontEnd(per_request_s=0.0, per_prompt_token_s=0.0, per_output_token_s=0.0, delay_s=0.0)
FREE_ROUTER = RouterSpec(per_request_s=0.0, per_prompt_token_s=0.0, per_output_token_s=0.0)
ROOMY = EngineSettings(
    max_num_seqs=1000,
    max_num_batched_tokens=100_000,
    max_model_len=50_000,
    block_size=16,
    num_kv_blocks=1_000_000,
    enable_prefix_caching=False,
    scheduler_reserve_full_isl=True,
    async_scheduling=True,
)


@dataclass(frozen=True, kw_only=True)
class AffineCurve:
    """An iteration time affine in each of its causes; the slope over KV changes once, at the knee.

    Attributes:
        per_request_s: for each request that decodes or has a prefill chunk.
    """

    fixed_s: float = 0.0
    per_request_s: float = 0.0
    per_prefill_token_s: float = 0.0
    per_kv_token_s: float = 0.0
    knee_kv_tokens: float = inf
    per_kv_token_beyond_s: float = 0.0

    @property
    def source(self) -> CurveSource:
        return CurveSource(label="made up", detail="a curve for tests")

    def iteration_s(self, work: IterationWork) -> float:
        fixed_s, per_kv_token_s, _ = self.decode_piece(work.decodes + work.prefill_chunks, work.decode_kv_tokens)
        return fixed_s + per_kv_token_s * work.decode_kv_tokens + self.per_prefill_token_s * work.prefill_tokens

    def decode_piece(self, decodes: int, decode_kv_tokens: int) -> DecodePiece:
        fixed_s = self.fixed_s + self.per_request_s * decodes
        if decode_kv_tokens <= self.knee_kv_tokens:
            return DecodePiece(fixed_s, self.per_kv_token_s, self.knee_kv_tokens)
        fixed_s += (self.per_kv_token_s - self.per_kv_token_beyond_s) * self.knee_kv_tokens
        return DecodePiece(fixed_s, self.per_kv_token_beyond_s, inf)


def make_expert(
    curve: AffineCurve,
    *,
    name: str = "expert",
    engine: EngineSettings = ROOMY,
    front_end: FrontEnd = FREE,
    replicas: int = 1,
) -> Expert:
    return Expert(
        name=name,
        model="model",
        quantization="bf16",
        gpu="GPU",
        tensor_parallel_size=1,
        replicas=replicas,
        engine=engine,
        front_end=front_end,
        curve=curve,
        gpus=replicas,
        price_per_hour=None,
    )


def make_plan(
    experts: Expert | tuple[Expert, ...],
    load: Load,
    *,
    at: float,
    router: RouterSpec | None = None,
    classes: dict[str, ClassSpec] | None = None,
    class_map: tuple[tuple[int, ...], ...] = ((0,),),
    run: RunSpec | None = None,
    replication: int = 0,
    data: WorkloadData | None = None,
) -> RunPlan:
    """A plan at this load; one class of prompts with one token, answered by one token, where nothing else is said."""
    return RunPlan(
        fleet=Fleet(
            name="fleet",
            router=router,
            experts=experts if isinstance(experts, tuple) else (experts,),
            class_map=class_map,
        ),
        workload=WorkloadSpec(
            classes=classes or {"class": ClassSpec(prompt_tokens=Fixed(value=1), output_tokens=Fixed(value=1))},
            load=load,
        ),
        run=run or RunSpec(requests=100),
        data=data or WorkloadData(),
        load=at,
        replication=replication,
    )
