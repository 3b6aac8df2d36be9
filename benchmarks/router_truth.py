"""What ``simulate`` says of the gateway, beside the gateway itself: ``python -m benchmarks.router_truth``.

Real users send through the real gateway, with its real classifier, to engines that are known exactly: the simulator's
own, in real time (``tests.kit.engine_expert``). So a prediction that is off is off about the router, the front ends or
the network. What those cost is measured first, as ``calibrate measure`` does; nothing is typed in. The gateway has one
core to itself and everything else the others. Where the client says that it did not keep up, its figures are its own.
"""

import argparse
import asyncio
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from time import monotonic, sleep

import numpy as np
from rich.console import Console

from calibrate.check.check import OTHER_DRAWS
from calibrate.check.check_report import (
    check_picture,
    figure_markdown,
    figure_table,
    station_markdown,
    station_table,
)
from calibrate.check.comparison import Figure, compare
from calibrate.check.station_times import StationTime
from calibrate.check.taken_for import taken_for
from calibrate.measure.client import PATIENCE
from calibrate.measure.machine import cpu_seconds, device_name
from calibrate.measure.router import (
    PROMPT_TOKENS,
    USERS,
    Prompts,
    RouterCosts,
    cpu_costs,
    first_token_s,
    measure_router,
)
from real.users.engine_metrics import read_metrics
from real.users.load_client import LoadClient
from real.users.run import run
from sim.fleet_file import LoadedFleetFile, load_fleet
from sim.metrics import Requests, completed_in_window
from sim.plots import save_picture
from sim.records import RunRecord
from sim.report import wide_console
from sim.result import Result
from sim.run import loads, simulate, with_changes
from sim.spec import ALL_EXPERTS, FrontEndSpec
from tests.kit.engine_expert import EngineTimes
from tests.kit.engine_fleet import EngineExpert, EngineFleet, engine_fleet
from tests.kit.processes import running

FILE = Path(__file__).parent / "router_truth.yaml"
FLEET = "mocks"
IDLE_S = 3.0
COLUMNS = (
    ("request_throughput", "requests/s"),
    ("output_throughput", "tokens/s"),
    ("median_ttft_ms", "TTFT p50"),
    ("p99_ttft_ms", "TTFT p99"),
    ("median_tpot_ms", "TPOT p50"),
    ("median_e2el_ms", "E2E p50"),
    ("p99_e2el_ms", "E2E p99"),
)


STATIONS = {
    "router": ("sent_s", "router_end_s"),
    "to the engine": ("router_end_s", "engine_arrival_s"),
    "engine queue": ("engine_arrival_s", "scheduled_s"),
    "prefill": ("scheduled_s", "first_token_engine_s"),
    "first token's way": ("first_token_engine_s", "first_token_s"),
    "decode": ("first_token_engine_s", "last_token_engine_s"),
    "last token's way": ("last_token_engine_s", "last_token_s"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """Largest error that passes: a share of the measured value, or so many milliseconds, whichever is more."""

    share: float
    ms: float = 0.0


TARGETS = {
    "request_throughput": Target(0.02),
    "output_throughput": Target(0.02),
    "median_ttft_ms": Target(0.05, 1.0),
    "p99_ttft_ms": Target(0.15, 5.0),
    "median_e2el_ms": Target(0.02),
}


@dataclass(frozen=True, slots=True)
class Truth:
    """What was predicted and measured.

    Attributes:
        router, front_end: what they cost, measured.
        cpu: CPU seconds of the router a request at each load: (load, simulated, measured).
        notes: of the real runs.
    """

    figures: Sequence[Figure]
    stations: Sequence[StationTime]
    router: RouterCosts
    front_end: FrontEndSpec
    cpu: Sequence[tuple[float, float, float]]
    notes: Sequence[str]

    def remarks(self) -> list[str]:
        """Verdict, what was measured beforehand, and what the users noticed."""
        judged = [figure for figure in self.figures if figure.passes is not None]
        failing = [figure for figure in judged if not figure.passes]
        lines = [
            f"{'FAIL' if failing else 'PASS'}: {len(judged) - len(failing)} of {len(judged)} figures within target"
        ]
        lines += [
            f"{each.column} at {each.load:g} users: {each.error:+.1%}, limit {each.limit:.1%}" for each in failing
        ]
        for what, costs in (("router", self.router), ("front end", self.front_end)):
            shown = ", ".join(f"{name.removesuffix('_s')} {1e6 * value:.4g} µs" for name, value in costs)
            lines.append(f"{what}: {shown}")
        shown = "; ".join(f"{load:g} users {1e3 * a:.3g} / {1e3 * b:.3g}" for load, a, b in self.cpu)
        return [*lines, f"router's CPU ms a request, simulated / measured: {shown}", *self.notes]


def judged(figures: Sequence[Figure]) -> list[Figure]:
    """Return the figures with the tolerances of ``TARGETS`` and no allowance for noise."""

    def tolerance(figure: Figure) -> float:
        target = TARGETS.get(figure.column)
        if target is None or figure.expert != ALL_EXPERTS or not figure.measured:
            return nan
        return max(target.share, target.ms / figure.measured)

    return [replace(figure, tolerance=tolerance(figure), noise_floors=0.0) for figure in figures]


# -------------------------------------------------------------------------------------------- what things cost


@dataclass(frozen=True, slots=True)
class _Server:
    url: str
    served_model: str


def measured_costs(
    file: LoadedFleetFile, folder: Path, gateway_cores: Sequence[int]
) -> tuple[RouterCosts, FrontEndSpec]:
    """Return what the router and an expert's front end cost on this machine, before an engine of the fleet's own pace.

    The pace matters: the longer a process sleeps between two tokens, the colder its caches are when it is woken.
    """
    name, spec = next(iter(file.fleets[FLEET].experts.items()))
    expert = EngineExpert(FILE, name)
    with running(expert):
        expert.wait_until_ready()
        front_end = asyncio.run(_front_end(expert, name, Prompts(spec)))
        router = measure_router(file, FLEET, spec, _Server(expert.url, name), folder, cores=gateway_cores)
    return router, front_end


async def _front_end(expert: EngineExpert, name: str, prompts: Prompts) -> FrontEndSpec:
    """CPU of a mock's process, and what an idle request waits beyond that and its one iteration."""
    client = LoadClient(expert.url, PATIENCE)
    try:
        before = read_metrics(expert.url)
        waits_s = [await first_token_s(client, name, prompts.write(PROMPT_TOKENS), 2) for _ in range(15)]
        after = read_metrics(expert.url)
        costs = await cpu_costs(client, name, lambda: cpu_seconds(expert.pid) or nan, prompts, 0.0)
    finally:
        client.close()
    prefill_s = (after["prefill_s"] - before["prefill_s"]) / (after["requests"] - before["requests"])
    token_s = costs.per_output_token_s + costs.per_wake_up_s / USERS
    return FrontEndSpec(
        per_request_s=costs.per_request_s,
        per_prompt_token_s=0.0,
        per_output_token_s=token_s,
        # What remains of an idle request's wait, the process's own wake-ups included.
        delay_s=max(0.0, float(np.median(waits_s)) - prefill_s - costs.per_request_s - token_s),
    )


def calibrated(file: LoadedFleetFile, router: RouterCosts, front_end: FrontEndSpec) -> LoadedFleetFile:
    """Return the file with measured costs."""
    fleet = file.fleets[FLEET]
    assert fleet.router is not None
    costs = dict(router)
    experts = {name: each.model_copy(update={"front_end": front_end}) for name, each in fleet.experts.items()}
    changed = fleet.model_copy(update={"router": fleet.router.model_copy(update=costs), "experts": experts})
    return file.model_copy(update={"fleets": {FLEET: changed}})


# ------------------------------------------------------------------------------------------------- side by side


def truth(users: Sequence[int] | None, repeats: int, folder: Path, console: Console) -> Truth:
    """Measure what things cost, predict, run for real, and compare."""
    cores = sorted(os.sched_getaffinity(0))
    gateway_cores = cores[-1:] if len(cores) > 1 else cores
    os.sched_setaffinity(0, cores[:-1] or cores)  # of this process, and of those it starts
    file = load_fleet(FILE)
    console.print("measuring router and front end", highlight=False)
    router, front_end = measured_costs(file, folder, gateway_cores)
    changed = with_changes(calibrated(file, router, front_end), users=users, seed=None, replications=None)
    assert isinstance(changed, LoadedFleetFile)
    console.print("simulating", highlight=False)
    classified = taken_for(changed, FLEET)  # the very prompts, by the very classifier
    predicted = simulate(changed, taken_for=classified, workers=1)
    bounds = [
        simulate(changed, seed=changed.run.seed + draw, taken_for=classified, workers=1)
        for draw in range(1, OTHER_DRAWS + 1)
    ]
    measured: list[Result] = []
    cpu_s: list[list[float]] = []
    with engine_fleet(FILE, changed, FLEET, folder) as fleet:
        fleet.pin_gateway(gateway_cores)
        idle_share = _idle_share(fleet)
        for repeat in range(repeats):
            console.print(f"real users, run {repeat + 1} of {repeats}", highlight=False)
            each = [_run(changed, load, fleet, idle_share) for load in loads(changed.workload)]
            measured.append(replace(each[0][0], runs=[record for result, _ in each for record in result.runs]))
            cpu_s.append([spent_s for _, spent_s in each])
        engine_times = fleet.engine_times()
    return Truth(
        figures=judged(
            compare([predicted] * len(measured), [[each] for each in bounds], measured, FLEET, changed.check)
        ),
        stations=list(stations(predicted, measured, engine_times)),
        router=router,
        front_end=front_end,
        cpu=[
            (record.load, _router_cpu_s(record), float(spent_s))
            for record, spent_s in zip(predicted.runs, np.mean(cpu_s, axis=0), strict=True)
        ],
        notes=_notes(measured),
    )


def _idle_share(fleet: EngineFleet) -> float:
    """CPU seconds a second of a gateway without requests."""
    before_s = fleet.gateway.cpu_s()
    sleep(IDLE_S)
    return (fleet.gateway.cpu_s() - before_s) / IDLE_S


def _run(file: LoadedFleetFile, load: float, fleet: EngineFleet, idle_share: float) -> tuple[Result, float]:
    """Run one load; return its result and the gateway's CPU seconds a request."""
    began_s, before_s = monotonic(), fleet.gateway.cpu_s()
    result = run(file, users=[int(load)], url=fleet.url, replica_urls=fleet.replica_urls)
    spent_s = fleet.gateway.cpu_s() - before_s - idle_share * (monotonic() - began_s)
    return result, spent_s / len(result.runs[0].requests["status"])


def _router_cpu_s(record: RunRecord) -> float:
    """Simulated CPU seconds a request: the router's busy time over the requests answered meanwhile."""
    assert record.router is not None
    busy_s = record.router.utilization * (record.window_s[1] - record.window_s[0])
    return busy_s / float(completed_in_window(record).sum())


def stations(
    predicted: Result, measured: Sequence[Result], engine_times: Mapping[str, EngineTimes]
) -> Iterator[StationTime]:
    """Yield the median time of a request between the stops of its way, at each load."""
    for record in predicted.runs:
        real = [run for result in measured for run in result.runs if run.load == record.load]
        ours = _between_stops(record, record.requests)
        theirs = [_between_stops(run, _with_engine_times(run, engine_times)) for run in real]
        for name, simulated_s in ours.items():
            yield StationTime(
                load=record.load,
                expert=ALL_EXPERTS,
                station=name,
                simulated_s=simulated_s,
                measured_s=float(np.mean([each[name] for each in theirs])),
            )


def _between_stops(record: RunRecord, requests: Requests) -> dict[str, float]:
    counts = completed_in_window(record)
    return {
        name: float(np.median((requests[end] - requests[start])[counts])) for name, (start, end) in STATIONS.items()
    }


def _with_engine_times(record: RunRecord, engine_times: Mapping[str, EngineTimes]) -> Requests:
    """The columns with what the engines noted of each request, by its id."""
    found = re.search(r"as (\S+)-NUMBER", record.checks["ledger"])
    assert found is not None
    unknown = (nan, nan, nan, nan)
    rows = [engine_times.get(f"{found[1]}-{number}", unknown) for number in record.requests["request_id"]]
    columns = np.array(rows, np.float64).reshape(-1, len(unknown)).T - record.began_monotonic_s
    names = ("engine_arrival_s", "scheduled_s", "first_token_engine_s", "last_token_engine_s")
    return {**record.requests, **dict(zip(names, columns, strict=True))}


def _notes(measured: Sequence[Result]) -> list[str]:
    """Notes of the runs with their load, and how the client kept up at each load, each once."""
    lines = []
    for record in (record for result in measured for record in result.runs):
        lines += [f"{record.load:g} users: {note}" for note in record.notes]
        lines.append(f"{record.load:g} users: load client: {record.checks['load client']}")
    return list(dict.fromkeys(lines))


def write_report(found: Truth, folder: Path, repeats: int) -> None:
    """Write ``router-truth.md`` and its picture."""
    fleet = [figure for figure in found.figures if figure.expert == ALL_EXPERTS]
    title = "The router, predicted and measured"
    lines = [f"# {title}", "", f"Made on {device_name(gpu=False)}, each load {repeats} times, by", ""]
    lines += ["    python -m benchmarks.router_truth --report docs", "", *(f"- {line}" for line in found.remarks())]
    lines += ["", "![predicted and measured](router-truth.png)", ""]
    lines += ["Predicted / measured (error); bold: outside the target.", "", *figure_markdown(fleet, COLUMNS), ""]
    lines += ["Median milliseconds of a request at each stop of its way, simulated / measured:", ""]
    lines += station_markdown(found.stations)
    (folder / "router-truth.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_picture(check_picture(found.figures, title), folder / "router-truth.png", "png")


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--repeats", type=int, default=2, help="real runs of each load")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write router-truth.md and its picture there")
    arguments = parser.parse_args()
    console = wide_console()
    with tempfile.TemporaryDirectory() as name:
        found = truth(arguments.users, arguments.repeats, Path(name), Console(stderr=True))
    fleet = [figure for figure in found.figures if figure.expert == ALL_EXPERTS]
    console.print(figure_table(fleet, COLUMNS))
    console.print(station_table(found.stations, "median"))
    for line in found.remarks():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if arguments.report is not None:
        write_report(found, arguments.report, arguments.repeats)


if __name__ == "__main__":
    main()
