"""Which experts of a fleet file to measure, and the file with what was measured of them."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calibrate.measure.files import MeasurementError
from sim.fleet_file import LoadedFleetFile
from sim.mistakes import did_you_mean
from sim.spec import ExpertSpec, FleetFile

CALIBRATED_FILE = "fleet.calibrated.yaml"
_NOT_MEASURED = {"profile", "front_end", "replicas"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistinctExpert:
    """One engine to measure, and every place of the file that has it.

    Attributes:
        name: of its folder and its profile, unique in the file.
        places: (fleet, expert) that it stands for, the first one measured.
    """

    name: str
    spec: ExpertSpec
    places: tuple[tuple[str, str], ...]


def distinct_experts(
    file: FleetFile, fleets: Collection[str] = (), experts: Collection[str] = ()
) -> list[DistinctExpert]:
    """Return the different engines of a file: same model, format, device, settings and cores are one.

    Args:
        file: any.
        fleets: only of these; empty: of all.
        experts: only of these names; empty: all.

    Raises:
        ValueError: a name that the file lacks.
    """
    for name in fleets:
        if name not in file.fleets:
            raise ValueError(f"--fleet {name}: not in this file{did_you_mean(name, file.fleets)}")
    chosen = {name: fleet for name, fleet in file.fleets.items() if not fleets or name in fleets}
    known = {name for fleet in chosen.values() for name in fleet.experts}
    for name in experts:
        if name not in known:
            raise ValueError(f"--expert {name}: no such expert{did_you_mean(name, known)}")
    found: dict[str, tuple[ExpertSpec, list[tuple[str, str]]]] = {}
    for fleet_name, fleet in chosen.items():
        for name, spec in fleet.experts.items():
            if not experts or name in experts:
                found.setdefault(_key(spec), (spec, []))[1].append((fleet_name, name))
    names: list[str] = []
    for _, places in found.values():
        fleet_name, name = places[0]
        names.append(name if name not in names else f"{fleet_name}-{name}")
    return [
        DistinctExpert(name=name.replace("/", "-"), spec=spec, places=tuple(places))
        for name, (spec, places) in zip(names, found.values(), strict=True)
    ]


def calibrated_yaml(
    file: LoadedFleetFile, profiles: Mapping[tuple[str, str], str], router: Mapping[str, Mapping[str, Any]], note: str
) -> str:
    """Return the fleet file, defaults filled in, with measured profiles and router times; itself a fleet file.

    Args:
        file: as loaded.
        profiles: (fleet, expert) -> profile file, relative to where the text is written.
        router: fleet -> fields of its router.
        note: a comment for its top.
    """
    content: dict[str, Any] = file.model_dump(mode="json", exclude_none=True)
    for fleet_name, fleet in content["fleets"].items():
        for name, expert in fleet["experts"].items():
            profile = profiles.get((fleet_name, name))
            if profile is not None:
                expert["profile"] = profile
        if fleet_name in router:
            fleet["router"] = {**(fleet.get("router") or {}), **router[fleet_name]}
    comment = "".join(f"# {line}\n" for line in note.splitlines())
    return comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def without_profiles(file: LoadedFleetFile) -> LoadedFleetFile:
    """Return the file with the roofline for every expert: an old profile is no reason not to measure anew."""
    fleets = {
        name: fleet.model_copy(
            update={
                "experts": {name: expert.model_copy(update={"profile": None}) for name, expert in fleet.experts.items()}
            }
        )
        for name, fleet in file.fleets.items()
    }
    return file.model_copy(update={"fleets": fleets})


def _key(spec: ExpertSpec) -> str:
    return spec.model_dump_json(exclude=_NOT_MEASURED)


def write_text(path: Path, text: str) -> None:
    """Write a file at once: all of it or nothing.

    Raises:
        MeasurementError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise MeasurementError(
            f"{path}: cannot be written ({error.strerror or error}); what was measured is kept: make room and give the "
            "same command again"
        ) from error
