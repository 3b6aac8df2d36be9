"""Predictions by the roofline and by profile files, for ``calibrate validate``."""

from collections.abc import Sequence

from calibrate.measured_runs import MeasuredRun
from calibrate.predictor import CannotPredictError, PredictedEngine
from calibrate.run_engine import run_engine
from sim.catalogue import find_gpu, find_model, find_quantization
from sim.fleet import FrontEnd
from sim.profile import Profile, ProfileCurve
from sim.roofline import Roofline, default_front_end


class RooflinePredictor:
    """Knows every model and GPU of the catalogue; fitted on none of the runs."""

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        """Return the engine of a run; scheduling is taken as synchronous where the version is not known.

        Raises:
            CannotPredictError: the catalogue lacks its model, GPU or quantization, or they do not go together.
        """
        engine = run_engine(run)
        if not engine.quantization.supported_on(engine.gpu):
            raise CannotPredictError(f"{engine.quantization.name} does not run on {engine.gpu.name}")
        if not engine.model.allows_tensor_parallel(run.tp):
            raise CannotPredictError(f"{engine.model.name} cannot be split over {run.tp} GPUs")
        async_scheduling = bool(engine.async_scheduling)
        curve = Roofline(
            engine.model,
            engine.quantization,
            engine.gpu,
            tensor_parallel_size=run.tp,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            async_scheduling=async_scheduling,
        )
        return PredictedEngine(
            curve=curve, front_end=default_front_end(), async_scheduling=async_scheduling, label="roofline"
        )


class ProfilePredictor:
    """Knows the engines that its profiles were fitted for, and no others."""

    def __init__(self, profiles: Sequence[Profile]):
        self._profiles = {_identity(profile): profile for profile in profiles}

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        """Return the engine of the profile for this model, quantization, GPU and tensor-parallel size.

        Raises:
            CannotPredictError: there is none.
        """
        engine = run_engine(run)
        identity = engine.model.name, engine.quantization.name, engine.gpu.name, run.tp
        profile = self._profiles.get(identity)
        if profile is None:
            raise CannotPredictError(
                f"no profile for {engine.model.name} {engine.quantization.name} on {engine.gpu.name} TP {run.tp}"
            )
        costs = profile.front_end
        front_end = default_front_end() if costs is None else FrontEnd(**costs.model_dump())
        return PredictedEngine(
            curve=ProfileCurve(profile),
            front_end=front_end,
            async_scheduling=profile.expert.engine.async_scheduling,
            label=profile.name,
        )


def _identity(profile: Profile) -> tuple[str, str, str, int]:
    expert = profile.expert
    return (
        find_model(expert.model).name,
        find_quantization(expert.quantization).name,
        find_gpu(expert.gpu).name,
        expert.tensor_parallel_size,
    )
