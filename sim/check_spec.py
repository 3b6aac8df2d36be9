"""The ``check`` part of a fleet file: how near a prediction must come to the real run. ``simulate`` leaves it alone."""

from typing import Annotated

from pydantic import Field

from sim.spec_base import PositiveInt, Probability, Spec

Tolerance = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ToleranceSpec(Spec):
    """Largest relative errors that pass, at every load and for the fleet as a whole."""

    throughput: Tolerance = 0.05
    e2el_mean: Tolerance = 0.05
    tpot_mean: Tolerance = 0.05
    ttft_mean: Tolerance = 0.12
    p99: Tolerance = Field(0.20, description="of TTFT, TPOT and E2EL each")
    noise_floors: Annotated[float, Field(ge=0)] = Field(
        2.0, description="an error also passes within so many relative standard deviations of repeated real runs"
    )
    coverage: Probability = Field(0.8, description="least share of measured figures inside their predicted intervals")


class CheckSpec(Spec):
    """How ``expert-router check`` judges a fleet of this file."""

    repeats: PositiveInt = Field(
        3, description="real runs of each load, each of requests of its own; their spread tells the noise"
    )
    tolerances: ToleranceSpec = ToleranceSpec()
