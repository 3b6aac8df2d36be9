"""Made-up profiles, whose iterations take 10 ms whatever the work."""

from sim.profile import ExpertIdentity, FittedRange, FrontEndCosts, Parameter, Profile, Residuals, TermParameters
from sim.spec import EngineSpec


def profile_json(*, model: str, gpu: str, tensor_parallel_size: int = 1, front_end: FrontEndCosts | None = None) -> str:
    """Return the text of a profile called ``other`` for a certain expert."""
    return make_profile(
        "other", model=model, gpu=gpu, tensor_parallel_size=tensor_parallel_size, front_end=front_end
    ).model_dump_json()


def make_profile(
    name: str,
    *,
    model: str = "llama-3-8b",
    quantization: str = "bf16",
    gpu: str = "H100-SXM",
    tensor_parallel_size: int = 1,
    front_end: FrontEndCosts | None = None,
    error: float = 0.0,
) -> Profile:
    """Return a profile of an expert, with this error on what its fit had not seen."""
    none = Parameter(value=0, low=0, high=0)
    return Profile(
        name=name,
        expert=ExpertIdentity(
            model=model,
            quantization=quantization,
            gpu=gpu,
            tensor_parallel_size=tensor_parallel_size,
            engine=EngineSpec(),
            engine_version="made up",
        ),
        parameters=TermParameters(
            per_iteration=Parameter(value=0.01, low=0.01, high=0.01),
            weights=none,
            per_token=none,
            per_attention_pair=none,
            per_prefill_chunk=none,
            per_decode=none,
            per_kv_token=none,
        ),
        residuals=Residuals(
            measurements=1,
            what="iterations",
            held_out=False,
            mean_error=0,
            median_absolute_error=error / 2,
            p90_absolute_error=error,
        ),
        range=FittedRange(max_decodes=1, max_decode_kv_tokens=1, max_prefill_tokens=1),
        front_end=front_end,
        provenance="made up for tests",
        licence="none",
    )
