"""What a calibration offers to those who predict with it: an engine's service curve, its front end, their source."""

from dataclasses import dataclass
from typing import Protocol

from calibrate.tables.measured_runs import MeasuredRun
from sim.fleet import FrontEnd
from sim.service_curve import ServiceCurve


class CannotPredictError(ValueError):
    """A run that cannot be predicted, with the reason in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedEngine:
    """The engine of a measured run as the simulation is to run it.

    Attributes:
        curve: seconds of its iterations.
        front_end: of its API server.
        async_scheduling: whether it decides a batch while the one before runs.
        label: the profile or roofline used, for the ``profile`` column of an error table.
    """

    curve: ServiceCurve
    front_end: FrontEnd
    async_scheduling: bool
    label: str


class Predictor(Protocol):
    """Anything that knows engines: the roofline, or a fit that some experiments were left out of."""

    def engine_of(self, run: MeasuredRun) -> PredictedEngine:
        """Return the engine of a run.

        Raises:
            CannotPredictError: its model, GPU, quantization or engine is unknown.
        """
        ...
