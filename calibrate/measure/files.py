"""What a measurement of one expert leaves on disk, rewritten whole after every point.

``iterations.parquet`` (ITERATION_COLUMNS), ``requests.parquet`` (SENT_COLUMNS) and ``meta.json``: what was measured, by
which engine on which machine, and the list of finished points. Each file is replaced at once, ``meta.json`` last; rows
of a point that it does not list are those of an interruption, and are dropped.
"""

from pathlib import Path
from typing import Any, Self

import pandas as pd
from pydantic import ValidationError

from calibrate.measure.iteration_records import ITERATION_COLUMNS, SENT_COLUMNS
from sim.profile import ExpertIdentity
from sim.spec_base import Spec

META, ITERATIONS, REQUESTS = "meta.json", "iterations.parquet", "requests.parquet"


class MeasurementError(ValueError):
    """A folder of measurements that cannot be read, continued or written; the message says what to do."""


class MeasuredPoint(Spec):
    """One finished point.

    Attributes:
        label: its name and ``#`` number, the ``point`` of its rows.
        started_s: seconds of measuring before it.
        took_s: of it, with sending and settling.
        reference: whether it watches for drift.
        front_end_cpu_s: of the API server process during it.
        matched: share of its iterations whose batch the simulated scheduler reproduced.
    """

    label: str
    started_s: float
    took_s: float
    reference: bool = False
    requests: int
    prompt_tokens: int
    output_tokens: int
    iterations: int
    matched: float
    front_end_cpu_s: float | None = None
    clock_mhz: float | None = None
    temperature_c: float | None = None


class Meta(Spec):
    """Everything about a measurement but its rows.

    Attributes:
        restarts: how often the engine was lost and started again.
        complete_minutes: the largest budget that was used up; 0 before.
    """

    format_version: int = 1
    expert: ExpertIdentity
    settings: dict[str, Any]
    num_gpu_blocks: int
    device: str
    cores: list[int]
    command: list[str]
    engine_command: list[str]
    program_version: str
    date: str
    lengths: dict[str, list[int]]
    restarts: int = 0
    complete_minutes: float = 0.0
    points: tuple[MeasuredPoint, ...] = ()

    @property
    def measured_s(self) -> float:
        """Seconds of measuring so far."""
        return sum(point.took_s for point in self.points)


class MeasurementFolder:
    """The files of one measurement, and their content in memory.

    Attributes:
        meta: None before the first engine has answered.
        iterations, requests: rows of the finished points.
    """

    def __init__(self, folder: Path):
        """Read what is there, if anything.

        Raises:
            MeasurementError: it cannot be read.
        """
        self.folder = folder
        self.meta: Meta | None = None
        self.iterations = pd.DataFrame({name: [] for name in ITERATION_COLUMNS}).astype(ITERATION_COLUMNS)
        self.requests = pd.DataFrame({name: [] for name in SENT_COLUMNS}).astype(SENT_COLUMNS)
        if not (folder / META).exists():
            return
        try:
            self.meta = Meta.model_validate_json((folder / META).read_text(encoding="utf-8"))
            labels = {point.label for point in self.meta.points}
            if labels:
                iterations = pd.read_parquet(folder / ITERATIONS)[list(ITERATION_COLUMNS)].astype(ITERATION_COLUMNS)
                requests = pd.read_parquet(folder / REQUESTS)[list(SENT_COLUMNS)].astype(SENT_COLUMNS)
                self.iterations = iterations[iterations["point"].isin(labels)].reset_index(drop=True)
                self.requests = requests[requests["point"].isin(labels)].reset_index(drop=True)
        except (OSError, ValueError, KeyError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise MeasurementError(
                f"{folder}: not readable as a measurement ({reason}); remove it or give another folder"
            ) from error

    @classmethod
    def existing(cls, folder: Path) -> Self:
        """Read a folder that ``calibrate measure`` wrote.

        Raises:
            MeasurementError: there is none, it cannot be read, or has no finished point.
        """
        found = cls(folder)
        if found.meta is None or not found.meta.points:
            raise MeasurementError(f"{folder}: no measurement in it; expert-router calibrate measure writes one")
        return found

    def begin(self, meta: Meta) -> None:
        """Note what is measured; goes on with what is there if it is the same.

        Raises:
            MeasurementError: the folder holds another engine's or machine's measurement, or cannot be written.
        """
        if self.meta is not None:
            known = self.meta
            pairs: dict[str, tuple[Any, Any]] = {
                "expert": (known.expert.model_dump(exclude={"engine"}), meta.expert.model_dump(exclude={"engine"})),
                "settings": (known.settings, meta.settings),
                "device": (known.device, meta.device),
                "cores": (known.cores, meta.cores),
            }
            for name, (before, now) in pairs.items():
                if before != now:
                    shown = _differences(before, now) if isinstance(before, dict) else f"{before}, now {now}"
                    raise MeasurementError(
                        f"{self.folder} was measured with another {name} ({shown}); "
                        "give another --out to measure anew, or remove the folder"
                    )
            return
        self.meta = meta
        self._write_meta()

    def add(self, point: MeasuredPoint, iterations: pd.DataFrame, requests: pd.DataFrame) -> None:
        """Add a finished point and write everything.

        Raises:
            MeasurementError: it could not be written; what was on disk before still is.
        """
        assert self.meta is not None
        self.iterations = pd.concat([self.iterations, iterations], ignore_index=True)
        self.requests = pd.concat([self.requests, requests], ignore_index=True)
        self.meta = self.meta.model_copy(update={"points": (*self.meta.points, point)})
        try:
            for frame, name in ((self.iterations, ITERATIONS), (self.requests, REQUESTS)):
                partial = self.folder / f".{name}.partial"
                frame.to_parquet(partial, index=False)
                partial.replace(self.folder / name)
        except OSError as error:
            raise self._not_written(error) from error
        self._write_meta()

    def note_complete(self, minutes: float) -> None:
        """Note that all was measured that so many minutes allow."""
        assert self.meta is not None
        self.meta = self.meta.model_copy(update={"complete_minutes": minutes})
        self._write_meta()

    def note_restart(self) -> None:
        """Count that the engine was lost and started again."""
        assert self.meta is not None
        self.meta = self.meta.model_copy(update={"restarts": self.meta.restarts + 1})
        self._write_meta()

    def _write_meta(self) -> None:
        assert self.meta is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{META}.partial"
            partial.write_text(self.meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
            partial.replace(self.folder / META)
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> MeasurementError:
        points = len(self.meta.points) - 1 if self.meta is not None and self.meta.points else 0
        return MeasurementError(
            f"{self.folder}: cannot be written ({error.strerror or error}); the {points} points before are kept: "
            "make room and give the same command again"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [name for name in before if before[name] != now.get(name)]
    return ", ".join(f"{name} {before[name]}, now {now.get(name)}" for name in changed)
