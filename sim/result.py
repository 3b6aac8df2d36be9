"""What a simulation or a real run returns: the raw records of every run, and the figures derived from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sim.fleet import Fleet
from sim.metrics import Row, load_columns, replication_columns, run_metrics
from sim.records import REQUEST_COLUMNS, STATUSES, RunRecord
from sim.service_curve import CurveSource
from sim.spec import FleetFile
from sim.summary import summary_columns, summary_rows

if TYPE_CHECKING:
    import pandas as pd

MAX_LISTED_LOADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Where the figures of a real run come from.

    Attributes:
        started: UTC date and time.
        urls: fleet -> where its users sent.
        engines: fleet -> expert -> its engine and version as the engine told them, e.g. ``vLLM 0.32.0``.
    """

    started: str
    urls: dict[str, str]
    engines: dict[str, dict[str, str]]

    @property
    def label(self) -> str:
        """Short, for titles: ``measured, vLLM 0.32.0``."""
        engines = dict.fromkeys(engine for experts in self.engines.values() for engine in experts.values())
        return ", ".join(["measured", *engines])


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of ``simulate``, or of ``run`` on a real fleet.

    Attributes:
        file: the fleet file that was simulated or run, every default filled in.
        fleets: the resolved fleets by name.
        runs: one record per finished run, ordered by fleet, load and replication.
        version: of the program that made it.
        interrupted: whether runs are missing or cut short because the user stopped it.
        measured: of a real run; None: every time was predicted.
    """

    file: FleetFile
    fleets: dict[str, Fleet]
    runs: list[RunRecord]
    version: str
    interrupted: bool = False
    measured: Measured | None = None

    @cached_property
    def replication_rows(self) -> list[Row]:
        """The metrics of every run as plain rows; see ``sim.metrics.run_metrics``."""
        return [row for run in self.runs for row in run_metrics(run, self.fleets[run.fleet], self.file.slo)]

    @cached_property
    def summary_rows(self) -> list[Row]:
        """The metrics over replications as plain rows; see ``sim.summary.summary_rows``."""
        return summary_rows(self.replication_rows)

    @cached_property
    def summary(self) -> "pd.DataFrame":
        """One row per fleet, load and expert (or ``all``): means over replications with 95 % confidence bounds."""
        import pandas as pd

        return pd.DataFrame(self.summary_rows, columns=list(summary_columns()))

    @cached_property
    def replications(self) -> "pd.DataFrame":
        """One row per fleet, load, expert (or ``all``) and replication."""
        import pandas as pd

        return pd.DataFrame(self.replication_rows, columns=list(replication_columns()))

    @cached_property
    def requests(self) -> "pd.DataFrame":
        """One row per request of every run: raw timestamps in seconds, names as categoricals."""
        return request_frame(self.runs)

    @cached_property
    def notes(self) -> list[str]:
        """What a reader of the figures must know, each note once with the fleets and loads it is about."""
        about: dict[str, dict[str, list[RunRecord]]] = {}
        for run in self.runs:
            for note in run.notes:
                about.setdefault(note, {}).setdefault(run.fleet, []).append(run)
        notes = []
        for note, fleets in about.items():
            places = (
                f"{fleet} at {loads_label(runs[0].load_kind, [run.load for run in runs])}"
                for fleet, runs in fleets.items()
            )
            notes.append(f"{'; '.join(places)}: {note}")
        if self.interrupted:
            begun = f"{len(self.runs)} runs had finished and are reported; the others are missing"
            if self.measured is not None:
                begun = f"{len(self.runs)} runs had begun and are reported, the last one as far as it came"
            notes.insert(0, f"interrupted: {begun}")
        return notes

    @cached_property
    def curves(self) -> dict[str, dict[str, CurveSource]]:
        """Where the iteration times of each fleet's experts come from: fleet -> expert -> source."""
        return {
            fleet.name: {expert.name: expert.curve.source for expert in fleet.experts} for fleet in self.fleets.values()
        }

    @cached_property
    def curve_labels(self) -> list[str]:
        """Where times come from, for titles: the distinct labels of the curves, or that they were measured."""
        if self.measured is not None:
            return [self.measured.label]
        return list(dict.fromkeys(source.label for experts in self.curves.values() for source in experts.values()))


def request_frame(runs: Sequence[RunRecord]) -> "pd.DataFrame":
    """Return one row per request of these runs: REQUEST_COLUMNS, and the names behind their indices as categoricals."""
    import pandas as pd

    lengths = [len(run.requests["status"]) for run in runs]
    loads = [load_columns(run) for run in runs]
    zeros = [np.zeros(length, dtype=np.int8) for length in lengths]
    names = {
        "fleet": _categorical([(index, (run.fleet,)) for index, run in zip(zeros, runs, strict=True)]),
        "load_kind": _categorical([(index, (run.load_kind,)) for index, run in zip(zeros, runs, strict=True)]),
        "users": np.repeat(np.array([load["users"] for load in loads], dtype=np.float64), lengths),
        "rate_rps": np.repeat(np.array([load["rate_rps"] for load in loads], dtype=np.float64), lengths),
        "replication": np.repeat(np.array([run.replication for run in runs], dtype=np.int32), lengths),
        "expert": _categorical([(run.requests["expert_index"], run.expert_names) for run in runs]),
        "class": _categorical([(run.requests["class_index"], run.class_names) for run in runs]),
        "routed_class": _categorical([(run.requests["routed_class_index"], run.class_names) for run in runs]),
    }
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(run.requests[name] for run in runs)])
        for name, dtype in REQUEST_COLUMNS.items()
    }
    status = _categorical([(run.requests["status"], STATUSES) for run in runs])
    return pd.DataFrame({**names, **columns, "status": status})


def loads_label(load_kind: str, loads: Sequence[float]) -> str:
    """Name loads for people: ``1,000 users``, ``1, 10 and 100 users``, ``7 loads from 1 to 64 users``."""
    if load_kind == "trace":
        return "the trace"
    values = [f"{load:,.0f}" if load_kind == "closed_loop" else f"{load:g}" for load in sorted(set(loads))]
    unit = "req/s" if load_kind == "open_loop" else "user" if values == ["1"] else "users"
    if len(values) > MAX_LISTED_LOADS:
        return f"{len(values)} loads from {values[0]} to {values[-1]} {unit}"
    listed = " and ".join(part for part in (", ".join(values[:-1]), values[-1]) if part)
    return f"{listed} {unit}"


def _categorical(parts: Sequence[tuple[NDArray[np.generic], tuple[str, ...]]]) -> "pd.Categorical[Any]":
    """Join (indices, names) of several runs into one categorical over all their names; index -1 is missing."""
    import pandas as pd

    categories = {name: code for code, name in enumerate(dict.fromkeys(name for _, names in parts for name in names))}
    codes = [np.empty(0, dtype=np.int32)]
    for index, names in parts:
        # The last entry answers index -1.
        codes.append(np.array([*(categories[name] for name in names), -1], dtype=np.int32)[index.astype(np.int64)])
    return pd.Categorical.from_codes(np.concatenate(codes), categories=pd.Index(list(categories), dtype="str"))
