"""Predictions by the roofline and by profile files, for ``calibrate validate``."""

from collections.abc import Sequence
from pathlib import Path

from calibrate.predictor import CannotPredictError, PredictedEngine
from calibrate.tables.measured_runs import MeasuredRun
from calibrate.tables.run_engine import RunEngine, run_engine
from sim.catalogue import find_gpu, find_model, find_quantization
from sim.profile import load_profile
from sim.resolve import resolve_expert
from sim.spec import EngineSpec, ExpertSpec


class RooflinePredictor:
    """Knows every model and GPU of the catalogue; fitted on none of the runs."""

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        """Return the engine of a run; scheduling is taken as synchronous where the version is not known.

        Raises:
            CannotPredictError: the catalogue lacks its model, GPU or quantization, or they do not go together.
        """
        engine = run_engine(run)
        return _resolved(run, engine, None, async_scheduling=bool(engine.async_scheduling))


class ProfilePredictor:
    """Knows the engines that its profiles were fitted for, and no others."""

    def __init__(self, paths: Sequence[Path]):
        """Read the profiles.

        Raises:
            ProfileError: one of them cannot be read.
            UnknownNameError: one of them is of a model, GPU or quantization that the catalogue lacks.
        """
        self._profiles: dict[tuple[str, str, str, int], tuple[Path, bool]] = {}
        for path in paths:
            expert = load_profile(path).expert
            shape = find_model(expert.model), find_quantization(expert.quantization), find_gpu(expert.gpu)
            identity = shape[0].name, shape[1].name, shape[2].name, expert.tensor_parallel_size
            self._profiles[identity] = path, expert.engine.async_scheduling

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        """Return the engine of the profile for this model, quantization, GPU and tensor-parallel size.

        Raises:
            CannotPredictError: there is none.
        """
        engine = run_engine(run)
        found = self._profiles.get((engine.model.name, engine.quantization.name, engine.gpu.name, run.tp))
        if found is None:
            raise CannotPredictError(
                f"no profile for {engine.model.name} {engine.quantization.name} on {engine.gpu.name} TP {run.tp}"
            )
        path, async_scheduling = found
        return _resolved(run, engine, path, async_scheduling=async_scheduling)


def _resolved(run: MeasuredRun, engine: RunEngine, profile: Path | None, *, async_scheduling: bool) -> PredictedEngine:
    if not engine.quantization.supported_on(engine.gpu):
        raise CannotPredictError(f"{engine.quantization.name} does not run on {engine.gpu.name}")
    if not engine.model.allows_tensor_parallel(run.tp):
        raise CannotPredictError(f"{engine.model.name} cannot be split over {run.tp} GPUs")
    expert = resolve_expert(
        run.run_id,
        ExpertSpec(
            model=engine.model.name,
            quantization=engine.quantization.name,
            gpu=engine.gpu.name,
            tensor_parallel_size=run.tp,
            engine=EngineSpec(
                max_num_seqs=engine.max_num_seqs,
                max_num_batched_tokens=engine.max_num_batched_tokens,
                max_model_len=engine.max_model_len,
                block_size=engine.block_size,
                num_gpu_blocks_override=engine.num_kv_blocks + 1,
                async_scheduling=async_scheduling,
            ),
            profile=None if profile is None else str(profile),
        ),
    )
    return PredictedEngine(
        curve=expert.curve,
        front_end=expert.front_end,
        async_scheduling=async_scheduling,
        label="roofline" if profile is None else expert.curve.source.label,
    )
