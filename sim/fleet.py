"""A fleet as the simulation runs it: every default resolved, KV blocks and service curves found."""

from dataclasses import dataclass, field

from sim.serve_spec import HealthSpec, LimitSpec
from sim.service_curve import ServiceCurve
from sim.spec import RouterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Resolved settings of one engine, under vLLM's names where it has one.

    Attributes:
        num_kv_blocks: usable KV blocks (vLLM's null block not counted).
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_kv_blocks: int
    enable_prefix_caching: bool
    scheduler_reserve_full_isl: bool
    async_scheduling: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEnd:
    """What a request and its tokens cost in a replica's front end.

    Attributes:
        delay_s: what a request waits between front end and engine while nobody works on it (sockets, hand-over).
        per_request_s: CPU seconds of the front-end process a request; likewise per prompt and per output token.
        per_request_engine_s: what a request that comes to a busy engine takes from it besides, where front end and
            engine share cores: the iteration that admits it takes so much longer.
    """

    per_request_s: float
    per_prompt_token_s: float
    per_output_token_s: float
    delay_s: float = 0.0
    per_request_engine_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One expert, resolved.

    Attributes:
        gpus: of all its replicas together.
        price_per_hour: of all its replicas together, in US dollars; None when the catalogue has no price.
    """

    name: str
    model: str
    quantization: str
    gpu: str
    tensor_parallel_size: int
    replicas: int
    engine: EngineSettings
    front_end: FrontEnd
    curve: ServiceCurve
    gpus: int
    price_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """One replica is down.

    Attributes:
        for_s: infinite when it stays down.
    """

    expert_index: int
    replica_index: int
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A router (or none) and its experts.

    Attributes:
        class_map: for each class of the workload, in order, the indices of its experts, the preferred one first.
        outages: of its replicas.
        health, limits: what the router makes of them.
    """

    name: str
    router: RouterSpec | None
    experts: tuple[Expert, ...]
    class_map: tuple[tuple[int, ...], ...]
    outages: tuple[Outage, ...] = ()
    health: HealthSpec = field(default_factory=HealthSpec)
    limits: LimitSpec = field(default_factory=LimitSpec)
