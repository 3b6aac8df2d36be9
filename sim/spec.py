"""The fleet file as values: what a user states, checked on construction, nothing derived and nothing read.

``sim.fleet_file`` reads YAML into these models; ``sim.fleet`` resolves them into what the simulation runs.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sim.check_spec import CheckSpec
from sim.serve_spec import ServeSpec
from sim.spec_base import PositiveInt, PositiveSeconds, Probability, Seconds, Share, Spec

# ---------------------------------------------------------------------------------------------- lengths and times


class Fixed(Spec):
    """Always the same value."""

    distribution: Literal["fixed"] = "fixed"
    value: Annotated[float, Field(ge=0)]


class Uniform(Spec):
    """Uniform between ``min`` and ``max``, both included for token counts."""

    distribution: Literal["uniform"] = "uniform"
    min: Annotated[float, Field(ge=0)]
    max: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max must be >= min, got min {self.min:g} and max {self.max:g}")
        return self


class Exponential(Spec):
    """Exponential with this mean."""

    distribution: Literal["exponential"] = "exponential"
    mean: Annotated[float, Field(gt=0)]


class Lognormal(Spec):
    """Lognormal by its mean and coefficient of variation (``cv`` = standard deviation / mean), then clipped.

    Clipping to ``min`` and ``max`` moves the mean a little; the resolved file states both as given.
    """

    distribution: Literal["lognormal"] = "lognormal"
    mean: Annotated[float, Field(gt=0)]
    cv: Annotated[float, Field(gt=0)]
    min: Annotated[float, Field(ge=0)] = 0
    max: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max must be >= min, got min {self.min:g} and max {self.max:g}")
        return self


class Empirical(Spec):
    """Values drawn with replacement from a column of a CSV (or CSV.gz) file, path relative to the fleet file.

    A ShareGPT file (``.json`` or ``.json.gz``) has the columns ``prompt_tokens`` and ``output_tokens``. Two columns of
    one file are drawn independently of each other.
    """

    distribution: Literal["empirical"] = "empirical"
    file: str
    column: str
    max: Annotated[float, Field(gt=0)] | None = None


def _number_is_fixed(value: Any) -> Any:
    """Let ``prompt_tokens: 512`` stand for ``{distribution: fixed, value: 512}``."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"distribution": "fixed", "value": value}
    return value


Distribution = Annotated[
    Fixed | Uniform | Exponential | Lognormal | Empirical,
    Field(discriminator="distribution"),
]
Quantity = Annotated[Distribution, BeforeValidator(_number_is_fixed, json_schema_input_type=float | Distribution)]


# ------------------------------------------------------------------------------------------------------ the fleet

ALL_EXPERTS = "all"
"""Stands for a fleet's experts together where tables name experts."""


class EngineSpec(Spec):
    """Engine settings under vLLM's own names; what is left out takes vLLM's default for the GPU."""

    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    max_model_len: PositiveInt | None = Field(None, description="default: the model's own, at most 8192")
    block_size: PositiveInt | None = Field(None, description="tokens of a KV block; none: 16, on a CPU 128")
    dtype: Literal["auto", "float32"] = Field(
        "auto", description="of activations and unquantized weights: auto, bfloat16; float32 on CPUs only"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.92
    num_gpu_blocks_override: Annotated[int, Field(ge=2)] | None = Field(
        None, description="KV blocks as the engine resolved them, when known"
    )
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    enable_prefix_caching: bool = True
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = Field(True, description="on a CPU vLLM schedules synchronously whatever is set")
    enforce_eager: bool = False
    generation_config: Literal["auto", "vllm"] = Field(
        "auto", description="sampling defaults: auto, the model's own, whose top-p or top-k takes time; vllm, none"
    )


class FrontEndSpec(Spec):
    """The API server process of one replica: a delay, and CPU seconds of its work. Left out: the curve's own."""

    delay_s: Seconds | None = Field(None, description="waited by each request without occupying the process")
    per_request_s: Seconds | None = None
    per_prompt_token_s: Seconds | None = None
    per_output_token_s: Seconds | None = None
    per_request_engine_s: Seconds | None = Field(
        None, description="what a request takes from a busy engine, where front end and engine share cores"
    )


class ExpertSpec(Spec):
    """One model in one quantization on one kind of GPU at one tensor-parallel size, ``replicas`` times."""

    model: str
    quantization: str = "bf16"
    gpu: str
    tensor_parallel_size: PositiveInt = 1
    replicas: PositiveInt = 1
    checkpoint: str | None = Field(
        None, description="where serve finds the weights, a folder or a hub's name; none: random ones of this shape"
    )
    cores: PositiveInt | None = Field(
        None, description="of each replica on a CPU; none: the machine's, shared evenly over the fleet's replicas"
    )
    engine: EngineSpec = EngineSpec()
    front_end: FrontEndSpec = FrontEndSpec()
    profile: str | None = Field(
        None, description="a profile file, a packaged one's name, or packaged: this expert's; none: the roofline"
    )


Policy = Literal["class", "class_with_spill_over", "random", "round_robin", "least_outstanding", "power_of_two_choices"]
ReplicaPolicy = Literal["random", "round_robin", "least_outstanding", "power_of_two_choices"]


class RouterSpec(Spec):
    """The gateway: classifies each prompt, picks an expert and a replica, and passes every streamed token on.

    The defaults for service times are measured: an aiohttp gateway with uvloop spends 0.13 ms of CPU a request and
    0.03 ms a streamed chunk, and a folded TF-IDF table classifies in 0.01 ms plus 0.00037 ms a word; a token is taken
    as 0.75 words.
    """

    policy: Policy = "class"
    replica_policy: ReplicaPolicy = "least_outstanding"
    workers: PositiveInt = 1
    per_request_s: Seconds = 0.14e-3
    per_prompt_token_s: Seconds = 0.28e-6
    per_output_token_s: Seconds = 0.03e-3
    per_wake_up_s: Seconds = Field(
        0.0,
        description="more for the first request, or the first token of an engine iteration, that meets an idle worker",
    )
    service_cv: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0, description="coefficient of variation of the per-request service time: 0 constant, 1 exponential"
    )
    user_network_s: Seconds = Field(0.0, description="one-way delay between users and the router")
    expert_network_s: Seconds = Field(0.0, description="one-way delay between the router and its experts")
    accuracy: Probability = Field(1.0, description="share of prompts classified right; others are spread evenly")
    confusion: dict[str, dict[str, Annotated[float, Field(ge=0)]]] | None = Field(
        None, description="true class -> {routed class: weight}; replaces accuracy for the classes it names"
    )
    spill_over_outstanding: PositiveInt | None = Field(
        None, description="outstanding requests per replica at which an expert counts as saturated; none: max_num_seqs"
    )


class OutageSpec(Spec):
    """One replica's process is killed; answers under way break off, and it comes back with an empty KV cache.

    What becomes of requests is up to the router, as ``serve.health`` and ``serve.limits.retry_share`` say.
    """

    expert: str
    replica: Annotated[int, Field(ge=0, description="counted from 0")] = 0
    at_s: Seconds = Field(description="after the run's beginning, warm-up included")
    for_s: PositiveSeconds | None = Field(
        None, description="until it answers again (a real one takes as long as it takes); none: it stays down"
    )


class FleetSpec(Spec):
    """Experts, and the router in front of them. Without a router users talk to the one expert directly."""

    extends: str | None = Field(None, description="another fleet of this file whose fields are taken where not given")
    router: RouterSpec | None = None
    experts: Annotated[dict[str, ExpertSpec], Field(min_length=1)]
    class_map: dict[str, list[str]] | None = Field(
        None, description="class -> experts, the first preferred, the others its fallbacks; none: by equal names"
    )
    outages: list[OutageSpec] = Field(default=[], description="replicas that die during a run")

    @field_validator("experts")
    @classmethod
    def _all_is_taken(cls, experts: dict[str, ExpertSpec]) -> dict[str, ExpertSpec]:
        if ALL_EXPERTS in experts:
            raise ValueError(f"no expert may be named {ALL_EXPERTS!r}, which tables use for the whole fleet")
        return experts


# --------------------------------------------------------------------------------------------------- the workload


class ClassSpec(Spec):
    """What prompts of one class look like, and their share of the traffic."""

    share: Share = 1.0
    prompt_tokens: Quantity
    output_tokens: Quantity
    shared_prefix_tokens: Annotated[int, Field(ge=0)] = Field(
        0, description="leading prompt tokens equal in all prompts of the class (a system prompt)"
    )


class UserGrid(Spec):
    """``points`` numbers of users spaced evenly in their logarithm, rounded, both ends included."""

    start: PositiveInt
    stop: PositiveInt
    points: Annotated[int, Field(ge=2)]


class ClosedLoop(Spec):
    """Users who each wait for the answer, think, and send the next prompt. ``users`` may list several loads."""

    kind: Literal["closed_loop"] = "closed_loop"
    users: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] | UserGrid
    think_time_s: Quantity = Fixed(value=0.0)
    ramp_up_s: Seconds = Field(0.0, description="users start evenly spread over this time")


class OpenLoop(Spec):
    """Arrivals that ignore completions. ``burstiness`` 1 is Poisson; otherwise gamma gaps of that shape."""

    kind: Literal["open_loop"] = "open_loop"
    rate_rps: Annotated[float, Field(gt=0)] | Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    burstiness: Annotated[float, Field(ge=0.01)] = 1.0


class Trace(Spec):
    """Recorded arrival times and lengths, replayed. Classes are drawn by share; their lengths are not used."""

    kind: Literal["trace"] = "trace"
    file: str
    format: Literal["azure", "burstgpt", "mooncake", "timed_trace"]
    time_unit: Literal["s", "ms"] | None = Field(
        None, description="of numeric timestamps; none: mooncake milliseconds, timed_trace and burstgpt seconds"
    )
    time_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="2 replays at half the speed, 0.5 at double")


Load = Annotated[ClosedLoop | OpenLoop | Trace, Field(discriminator="kind")]


class WorkloadSpec(Spec):
    """Who sends, and what."""

    classes: Annotated[dict[str, ClassSpec], Field(min_length=1)]
    load: Load


class RunSpec(Spec):
    """How long to measure. A run ends at the later of ``requests`` and ``requests_per_user * users`` completions.

    With ``duration_s`` it ends then instead. A trace is by default replayed whole. The first ``warm_up_requests``
    completions (or ``warm_up_s`` seconds) are left out of every figure; by default one completion per user in a closed
    loop, a tenth of the requests in an open loop, and nothing in a trace.
    """

    requests: PositiveInt | None = None
    requests_per_user: Annotated[float, Field(gt=0)] | None = None
    duration_s: PositiveSeconds | None = None
    warm_up_requests: Annotated[int, Field(ge=0)] | None = None
    warm_up_s: Seconds | None = None
    seed: Annotated[int, Field(ge=0)] = 1
    replications: PositiveInt = 3

    @model_validator(mode="after")
    def _one_end_one_warm_up(self) -> Self:
        if self.duration_s is not None and (self.requests is not None or self.requests_per_user is not None):
            raise ValueError("give either duration_s or requests / requests_per_user, not both")
        if self.warm_up_requests is not None and self.warm_up_s is not None:
            raise ValueError("give either warm_up_requests or warm_up_s, not both")
        return self


class SloSpec(Spec):
    """A request is good when it meets every bound given; the SLO holds when ``percentile`` % of requests are good."""

    ttft_ms: Annotated[float, Field(gt=0)] | None = None
    tpot_ms: Annotated[float, Field(gt=0)] | None = None
    e2el_ms: Annotated[float, Field(gt=0)] | None = None
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.0


class FleetFile(Spec):
    """One file: named fleets compared under the same workload."""

    name: str = "fleet"
    description: str = ""
    workload: WorkloadSpec
    fleets: Annotated[dict[str, FleetSpec], Field(min_length=1)]
    run: RunSpec = RunSpec()
    slo: SloSpec | None = None
    serve: ServeSpec = ServeSpec()
    check: CheckSpec = CheckSpec()
