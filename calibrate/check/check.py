"""``check``: the same fleet predicted and for real, and how far apart the two are."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from math import isnan
from pathlib import Path

import numpy as np

from calibrate.check.batch_sizes import BATCH_BINS, batch_shares, bin_labels
from calibrate.check.comparison import Figure, compare, coverage, is_load
from calibrate.check.pace import Pace, factors, paces
from calibrate.check.station_times import StationTime, station_times
from calibrate.check.taken_for import taken_for
from calibrate.check.turns import RECORDS, Step, of_repeat
from real.experts.iteration_log import IterationLine, IterationLog
from sim.outputs import write_result
from sim.records import RunRecord
from sim.request import Request
from sim.resolve import profile_of
from sim.result import Result
from sim.run import loads, simulate, trace_replica
from sim.spec import ClosedLoop, FleetFile, OpenLoop, Trace

OTHER_DRAWS = 4
"""Further seeds simulated for the interval of one run: what the draw of requests alone changes."""


@dataclass(frozen=True, kw_only=True)
class CheckOutcome:
    """What was predicted, what was measured, and what a comparison says.

    Attributes:
        file: the fleet file with its profiles.
        fleet: which of its fleets.
        predicted: simulated with the traffic of each real run.
        measured: one result for each repeated real run.
        figures: of every load that both sides have.
        stations: where requests spent their time, by load and expert.
        batches: replica -> shares of iterations by requests in them (``batch_bins``), simulated and measured, at the
            highest load.
        paces: how fast the engines' iterations were beside their curves.
        interrupted: whether real runs or a part of the calibration are missing.
    """

    file: FleetFile
    fleet: str
    predicted: Sequence[Result]
    measured: Sequence[Result]
    figures: Sequence[Figure]
    stations: Sequence[StationTime]
    batches: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    paces: Sequence[Pace] = ()
    batch_bins: Sequence[str] = field(default_factory=lambda: bin_labels(BATCH_BINS))
    interrupted: bool = False

    @property
    def title(self) -> str:
        """Name of the file and the fleet, and on what it ran."""
        names = dict.fromkeys((self.file.name, self.fleet))  # often one and the same
        return f"{', '.join(names)}: predicted and measured"

    @property
    def failing(self) -> list[Figure]:
        """Judged figures that are outside their tolerance and the noise."""
        return [figure for figure in self.figures if figure.passes is False]

    @property
    def coverage(self) -> float:
        """Share of the fleet's measured figures inside their predicted 90 % intervals."""
        return coverage(self.figures)

    @property
    def passed(self) -> bool:
        """Whether every judged figure passes and the intervals held enough of the measured ones."""
        judged = [figure for figure in self.figures if figure.passes is not None]
        return bool(judged) and not self.failing and self.coverage >= self.file.check.tolerances.coverage

    def remarks(self) -> list[str]:
        """What stands below the tables: verdict, coverage, the station furthest off, and the real runs' notes."""
        judged = [figure for figure in self.figures if figure.passes is not None]
        lines = [
            f"{'PASS' if self.passed else 'FAIL'}: {len(judged) - len(self.failing)} of {len(judged)} judged figures "
            f"within tolerance or noise ({sum(figure.within_tolerance for figure in judged)} within tolerance alone); "
            f"{self.coverage:.0%} of the fleet's measured figures inside their predicted "
            f"90 % intervals (at least {self.file.check.tolerances.coverage:.0%} asked)"
        ]
        lines += [
            f"  {figure.column} at load {figure.load:g}: {figure.error:+.1%}, limit {figure.limit:.1%} (noise "
            f"{'not known' if isnan(figure.noise_floor) else f'{figure.noise_floor:.1%}'})"
            for figure in self.failing
        ]
        if self.failing:
            worst = max(self.failing, key=lambda figure: abs(figure.error) / figure.limit)
            lines.append(self._blame(worst.load))
            if not isnan(worst.error_at_pace):
                lines.append(self._clock(worst))
        lines += [f"predicted with {label}" for each in self.predicted[:1] for label in each.curve_labels]
        measured = self.measured[0].measured if self.measured else None
        if measured is not None:
            engines = sorted({engine for fleet in measured.engines.values() for engine in fleet.values()})
            lines.append(f"measured {len(self.measured)} times, {measured.started}, {', '.join(engines)}")
            lines += self._other_versions(measured.engines.get(self.fleet, {}))
        lines += [f"note of a real run: {note}" for note in dict.fromkeys(n for r in self.measured for n in r.notes)]
        if self.interrupted:
            lines.append("interrupted: loads, repeats or a part of the calibration are missing")
        return lines

    def _other_versions(self, engines: Mapping[str, str]) -> list[str]:
        """Say which profiles are of another engine version than the one that ran, by expert."""
        lines = []
        for name, spec in self.file.fleets[self.fleet].experts.items():
            profile, ran = profile_of(spec), engines.get(name)
            if profile is not None and ran is not None and ran != profile.expert.engine_version:
                lines.append(
                    f"expert {name}: the profile {profile.name} is of {profile.expert.engine_version} and {ran} ran: "
                    "measure it again (leave out its profile, or give another --out)"
                )
        return lines

    def _clock(self, worst: Figure) -> str:
        """Say how much of a figure's error is the iteration times'."""
        shown = " and ".join(
            f"{each.pace:.2f} ({each.expert})" for each in self.paces if is_load(each.load, worst.load)
        )
        return (
            f"iterations took {shown} times what the profiles say of the same batches; with that put in, "
            f"{worst.column} at load {worst.load:g} is off by {worst.error_at_pace:+.1%}: that is the model's own"
        )

    def _blame(self, load: float) -> str:
        """Name the station whose time is furthest off at a load, of the expert where it is."""
        rows = [row for row in self.stations if is_load(row.load, load) and not isnan(row.simulated_s - row.measured_s)]
        if not rows:
            return "which station it is cannot be told: the engines did not say where requests spent their time"
        worst = max(rows, key=lambda row: abs(row.simulated_s - row.measured_s))
        return (
            f"furthest apart at load {load:g}: {worst.station} of {worst.expert}, simulated "
            f"{worst.simulated_s * 1e3:.1f} ms, measured {worst.measured_s * 1e3:.1f} ms a request"
        )


def check(
    file: FleetFile,
    fleet: str,
    measured: Sequence[Result],
    logs: Mapping[tuple[str, int], Path],
    *,
    folder: Path,
    step: Step,
    interrupted: bool = False,
) -> CheckOutcome:
    """Predict a fleet of a calibrated file that has been run for real, and compare.

    Args:
        file: its experts have profiles, or the roofline predicts.
        fleet: which of its fleets.
        measured: one result for each repeated real run, as ``take_turns`` made them.
        logs: (expert, replica index) -> log of its engine.
        folder: for the records of the prediction.
        step: shows progress.
        interrupted: runs or a part of the calibration are missing.

    Raises:
        FleetFileError, TraceError, ValueError: the file cannot work, see ``simulate``.
        KeyboardInterrupt: the user stopped it.
    """
    file = file.model_copy(update={"fleets": {fleet: file.fleets[fleet]}})
    repeats = [of_repeat(file, repeat) for repeat in range(len(measured))]
    with step("simulating") as progress:
        done, in_all = count(1), len(repeats) * (3 + len(loads(file.workload))) + OTHER_DRAWS

        def simulated(
            of: FleetFile, classes: Callable[[Request], int] | None, times: Mapping[str, float] | None = None
        ) -> Result:
            result = simulate(of, taken_for=classes, iteration_time_factors=times, workers=1)
            if result.interrupted:  # a verdict on a part of the loads or draws would look like one on all
                raise KeyboardInterrupt
            if progress is not None:
                progress(min(1.0, next(done) / in_all))
            return result

        classified = [taken_for(each, fleet) for each in repeats]
        traffic = list(zip(repeats, classified, strict=True))
        predicted = [simulated(each, classes) for each, classes in traffic]
        for number, result in enumerate(predicted, start=1):
            write_result(result, folder / f"predicted-{number}", RECORDS)
        bounds = [[simulated(each, classes, ends) for each, classes in traffic] for ends in _ends(predicted, fleet)]
        bounds += [[simulated(of_repeat(file, len(measured) + draw), None)] for draw in range(OTHER_DRAWS)]
        experts = predicted[0].fleets[fleet].experts if predicted else ()
        places = {expert.name: index for index, expert in enumerate(experts)}
        lines = {
            (places[name], replica): IterationLog(log).new_lines() for (name, replica), log in logs.items() if places
        }
        found = paces(experts, [run for result in measured for run in result.runs], lines)
        at_pace = [
            simulated(_at_load(each, load), classes, factors(found, load))
            for load in dict.fromkeys(pace.load for pace in found)
            for each, classes in traffic
        ]
        figures = compare(predicted, bounds, measured, fleet, file.check, at_pace=at_pace)
        compared = [load for load in loads(file.workload) if any(is_load(figure.load, load) for figure in figures)]
        stations = [row for load in compared for row in station_times(_at(predicted, load), _at(measured, load))]
        batches = _batches(predicted, measured, fleet, lines, classified) if measured else {}
    return CheckOutcome(
        file=file,
        fleet=fleet,
        predicted=predicted,
        measured=measured,
        figures=figures,
        stations=stations,
        batches=batches,
        paces=found,
        interrupted=interrupted,
    )


def _at_load(file: FleetFile, load: float) -> FleetFile:
    """The file with one of its workload's loads alone."""
    spec = file.workload.load
    if isinstance(spec, ClosedLoop):
        changed: ClosedLoop | OpenLoop | Trace = spec.model_copy(update={"users": [round(load)]})
    elif isinstance(spec, OpenLoop):
        changed = spec.model_copy(update={"rate_rps": [load]})
    else:
        changed = spec
    return file.model_copy(update={"workload": file.workload.model_copy(update={"load": changed})})


def _at(results: Sequence[Result], load: float) -> list[RunRecord]:
    """The runs of several results at one load."""
    return [record for result in results for record in result.runs if is_load(record.load, load)]


def _ends(predicted: Sequence[Result], fleet: str) -> list[dict[str, float]]:
    """All experts' iteration times at either end of what their profiles' held-out errors leave open.

    Beyond the fitted range the errors are the wider ones that the profile expects there.
    """
    errors: dict[str, float] = {}
    for result in predicted:
        for record in result.runs:
            for replica in record.replicas:
                if not isnan(replica.iteration_error):
                    name = result.fleets[fleet].experts[replica.expert_index].name
                    errors[name] = max(errors.get(name, 0.0), replica.iteration_error)
    if not errors:
        return []
    return [{name: 1 / (1 + error) for name, error in errors.items()}, {name: 1 + e for name, e in errors.items()}]


def _batches(
    predicted: Sequence[Result],
    measured: Sequence[Result],
    fleet: str,
    lines: Mapping[tuple[int, int], Sequence[IterationLine]],
    classified: Sequence[Callable[[Request], int] | None],
) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Requests per iteration at the highest load, from the simulation and from the engines' logs."""
    found: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    highest = predicted[0].runs[-1].load
    windows = [
        tuple(real.began_monotonic_s + edge_s for edge_s in real.window_s)
        for result in measured
        for real in result.runs
        if is_load(real.load, highest)
    ]
    experts = predicted[0].fleets[fleet].experts
    for (index, replica), logged in lines.items():
        sizes = [
            each.prefills + each.decodes
            for result, classes in zip(predicted, classified, strict=True)
            for each in trace_replica(result, fleet, index, replica, classes)
            if result.runs[-1].window_s[0] < each.start_s <= result.runs[-1].window_s[1]
        ]
        real = [
            line.context_requests + line.generation_requests
            for line in logged
            if any(start <= line.ended_s <= end for start, end in windows)
        ]
        found[f"{experts[index].name}/{replica}"] = batch_shares(np.array(sizes)), batch_shares(np.array(real))
    return found


def as_json(outcome: CheckOutcome) -> str:
    """Return the verdict and every figure as JSON for programs; null for what is not known."""

    def known(value: float) -> float | None:
        return None if isnan(value) else value

    return json.dumps(
        {
            "file": outcome.file.name,
            "fleet": outcome.fleet,
            "passed": outcome.passed,
            "coverage": known(outcome.coverage),
            "interrupted": outcome.interrupted,
            "figures": [
                {
                    "load": known(figure.load),
                    "expert": figure.expert,
                    "metric": figure.column,
                    "predicted": known(figure.predicted),
                    "predicted_interval": [known(figure.predicted_low), known(figure.predicted_high)],
                    "measured": known(figure.measured),
                    "measured_interval": [known(figure.measured_low), known(figure.measured_high)],
                    "error": known(figure.error),
                    "noise_floor": known(figure.noise_floor),
                    "error_at_pace": known(figure.error_at_pace),
                    "passes": figure.passes,
                }
                for figure in outcome.figures
            ],
            "paces": [asdict(pace) for pace in outcome.paces],
        },
        indent=1,
    )
