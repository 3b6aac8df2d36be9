"""What a fit determines: corrections of the roofline that all engines share, and overheads of each group of engines."""

from dataclasses import dataclass, fields
from typing import Literal

from calibrate.tables.measured_runs import MeasuredRun
from calibrate.tables.run_engine import is_v0, schedules_asynchronously
from sim.factors import OverheadFactors
from sim.roofline import Corrections

CORRECTIONS = tuple(field.name for field in fields(Corrections))
OVERHEADS = tuple(field.name for field in fields(OverheadFactors))


CONFIDENCE = 0.9
"""Of the intervals of parameters."""


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Engine versions that are taken to add the same to their kernels.

    Attributes:
        kernels: generation of its kernels. Corrections are shared within one and not between them: fitted together, the
            V0 engines' static batches took the mean held-out error of the serving runs from 1.4 to 3.2 % (asynchronous
            scheduling) and from 2.5 to 6.5 % (synchronous).
    """

    name: str
    async_scheduling: bool
    kernels: Literal["V1", "V0"] = "V1"


ASYNCHRONOUS = EngineGroup("vLLM 0.14 and later, asynchronous scheduling", True)
SYNCHRONOUS = EngineGroup("vLLM before 0.14 or of unknown version, synchronous scheduling", False)
V0 = EngineGroup("vLLM before 0.8 (V0 engine)", False, "V0")
GROUPS = (ASYNCHRONOUS, SYNCHRONOUS, V0)


def group_of(run: MeasuredRun) -> EngineGroup:
    """Return the group of a run's engine."""
    return group_of_version(run.engine_version)


def group_of_version(engine_version: str) -> EngineGroup:
    """Return the group of an engine version, e.g. of "0.15.1" or "vLLM 0.15.1"."""
    if is_v0(engine_version):
        return V0
    return ASYNCHRONOUS if schedules_asynchronously(engine_version) else SYNCHRONOUS


def overhead_columns(group: EngineGroup) -> slice:
    """Return where a group's overheads are among the parameters."""
    first = len(CORRECTIONS) + GROUPS.index(group) * len(OVERHEADS)
    return slice(first, first + len(OVERHEADS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A fitted parameter and its 90 % interval."""

    value: float
    low: float
    high: float
