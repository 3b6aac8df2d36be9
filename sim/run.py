"""``simulate``: every fleet of a file at every load, replicated, on as many processes as asked for."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from math import nan

import numpy as np

from sim.chrome_trace import TracedIteration
from sim.feasibility import check_feasible
from sim.fleet import Fleet
from sim.measuring import completions_to_measure
from sim.mistakes import did_you_mean
from sim.records import RunRecord
from sim.request import Request
from sim.resolve import resolve_fleet
from sim.result import Result
from sim.service_curve import ScaledCurve
from sim.simulation import RunPlan, Simulation
from sim.spec import ClosedLoop, FleetFile, OpenLoop, UserGrid, WorkloadSpec
from sim.traces import read_workload_data

WORTH_A_PROCESS = 30_000
"""Requests in all from which starting worker processes (a second or two) pays."""

Progress = Callable[[float], None]
"""Called with the share of the whole that is done, 0 to 1."""


def simulate(
    file: FleetFile,
    *,
    users: Sequence[int] | None = None,
    seed: int | None = None,
    replications: int | None = None,
    iteration_time_factors: Mapping[str, float] | None = None,
    taken_for: Callable[[Request], int] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Simulate every fleet of a file at every load and return the records and figures.

    The outcome depends on the file and the seed alone, not on ``workers``. Ctrl-C ends it early: what is finished is
    returned, with ``interrupted`` set.

    Args:
        file: from ``load_fleet``.
        users: loads of the closed loop instead of the file's.
        seed: instead of the file's.
        replications: instead of the file's.
        iteration_time_factors: expert name -> what its iteration times are multiplied by, to see what an error of its
            curve would do; experts left out keep theirs.
        taken_for: the class that the classifier takes each request for, where its prompt is known, as a check knows it;
            None: drawn as the router's ``accuracy`` and ``confusion`` have it.
        workers: processes; None: one per core where that pays. They are joblib's, so ``joblib.parallel_config`` can
            put them on another backend, Ray for one.
        progress: told how far it is.

    Raises:
        FleetFileError: the file describes something that cannot work.
        TraceError: a trace or a table of lengths cannot be read.
        ValueError: ``users`` for a workload that has no users.
    """
    file = with_changes(file, users=users, seed=seed, replications=replications)
    known = {name for fleet in file.fleets.values() for name in fleet.experts}
    for name in iteration_time_factors or ():
        if name not in known:
            raise ValueError(f"iteration_time_factors: no expert {name!r}{did_you_mean(name, known)}")
    data = read_workload_data(file.workload)
    check_feasible(file, data)
    fleets = {name: _scaled(resolve_fleet(file, name), iteration_time_factors or {}) for name in file.fleets}
    plans = [
        RunPlan(
            fleet=fleet,
            workload=file.workload,
            run=file.run,
            data=data,
            load=load,
            replication=replication,
            taken_for=taken_for,
        )
        for fleet in fleets.values()
        for load in loads(file.workload)
        for replication in range(file.run.replications)
    ]
    weights = [expected_requests(plan) for plan in plans]
    if workers is None:
        workers = (os.cpu_count() or 1) if sum(weights) >= WORTH_A_PROCESS else 1
    workers = min(workers, len(plans))
    done: dict[int, RunRecord] = {}
    interrupted = False
    try:
        for index, record in _run_all(plans, weights, workers, progress):
            done[index] = record
    except KeyboardInterrupt:
        interrupted = True
    return Result(
        file=file,
        fleets=fleets,
        runs=[done[index] for index in sorted(done)],
        version=program_version(),
        interrupted=interrupted,
    )


def _scaled(fleet: Fleet, factors: Mapping[str, float]) -> Fleet:
    """The fleet with the iteration times of these experts multiplied; names that only another fleet has are left."""
    experts = tuple(
        replace(expert, curve=ScaledCurve(expert.curve, factors[expert.name])) if expert.name in factors else expert
        for expert in fleet.experts
    )
    return replace(fleet, experts=experts)


def find_replica(file: FleetFile, place: str) -> tuple[str, int, int]:
    """Return fleet name, expert index and replica index of ``FLEET/EXPERT/REPLICA``, the last one a number from 0.

    Raises:
        ValueError: the file has no such replica.
    """
    places = {
        f"{fleet_name}/{expert_name}/{replica}": (fleet_name, index, replica)
        for fleet_name, fleet in file.fleets.items()
        for index, (expert_name, expert) in enumerate(fleet.experts.items())
        for replica in range(expert.replicas)
    }
    if place not in places:
        raise ValueError(f"no replica {place!r}; expected FLEET/EXPERT/REPLICA, for example {next(iter(places))!r}")
    return places[place]


def trace_replica(
    result: Result,
    fleet: str,
    expert_index: int,
    replica_index: int,
    taken_for: Callable[[Request], int] | None = None,
) -> list[TracedIteration]:
    """Simulate the first replication of a fleet's highest load again and return one replica's iterations.

    Args:
        result: of ``simulate``.
        fleet: one of its fleets.
        expert_index: in the fleet.
        replica_index: of the expert.
        taken_for: as ``simulate`` had it.
    """
    workload = result.file.workload
    simulation = Simulation(
        RunPlan(
            fleet=result.fleets[fleet],
            workload=workload,
            run=result.file.run,
            data=read_workload_data(workload),
            load=loads(workload)[-1],
            trace=(expert_index, replica_index),
            taken_for=taken_for,
        )
    )
    simulation.run()
    return simulation.traced


def program_version() -> str:
    """Return the installed version of the package; ``"unknown"`` in a checkout that is not installed."""
    try:
        return version("expert-router")
    except PackageNotFoundError:
        return "unknown"


def with_changes(
    file: FleetFile, *, users: Sequence[int] | None, seed: int | None, replications: int | None
) -> FleetFile:
    """Return the file with these settings in place of its own."""
    run = {name: value for name, value in (("seed", seed), ("replications", replications)) if value is not None}
    if run:
        file = file.model_copy(update={"run": file.run.model_copy(update=run)})
    if users is not None:
        load = file.workload.load
        if not isinstance(load, ClosedLoop):
            raise ValueError(f"users apply to a closed_loop workload only, this one is {load.kind}")
        if not users or min(users) < 1:
            raise ValueError(f"users must be numbers >= 1, got {list(users)}")
        load = load.model_copy(update={"users": list(users)})
        file = file.model_copy(update={"workload": file.workload.model_copy(update={"load": load})})
    return file


def loads(workload: WorkloadSpec) -> list[float]:
    """Return the loads of a workload in increasing order: users, requests per second, or one NaN for a trace."""
    load = workload.load
    if isinstance(load, ClosedLoop):
        users = load.users
        if isinstance(users, UserGrid):
            return sorted({float(round(n)) for n in np.geomspace(users.start, users.stop, users.points)})
        return sorted({float(n) for n in ([users] if isinstance(users, int) else users)})
    if isinstance(load, OpenLoop):
        rates = load.rate_rps
        return sorted(set([rates] if isinstance(rates, float) else rates))
    return [nan]


def expected_requests(plan: RunPlan) -> float:
    """Return about how many requests a run takes, to divide work and tell the time left."""
    measured, warm_up = completions_to_measure(plan.workload, plan.run, plan.load)
    if measured is not None:
        return measured + warm_up
    if plan.data.trace is not None:
        return len(plan.data.trace.arrival_s)
    assert plan.run.duration_s is not None
    # Ten seconds a request and user, for want of anything better before it is simulated.
    per_s = plan.load if isinstance(plan.workload.load, OpenLoop) else plan.load / 10
    return max(1.0, per_s * plan.run.duration_s)


def _run_all(
    plans: Sequence[RunPlan], weights: Sequence[float], workers: int, progress: Progress | None
) -> Iterator[tuple[int, RunRecord]]:
    total = sum(weights)
    finished = 0.0
    if workers <= 1:
        for index, plan in enumerate(plans):
            part = None if progress is None else _part(progress, finished / total, weights[index] / total)
            yield index, Simulation(plan, part).run()
            finished += weights[index]
            if progress is not None:
                progress(finished / total)
        return
    from joblib import Parallel, delayed  # not needed, and slow to import, in one process

    # The longest first, so that no core is left alone with one at the end.
    order = sorted(range(len(plans)), key=lambda index: -weights[index])
    tasks = (delayed(_run_one)(index, plans[index]) for index in order)
    for index, record in Parallel(n_jobs=workers, return_as="generator_unordered")(tasks):
        yield index, record
        finished += weights[index]
        if progress is not None:
            progress(finished / total)


def _part(progress: Progress, before: float, weight: float) -> Progress:
    """Return a progress for one run within the whole."""
    return lambda share: progress(before + share * weight)


def _run_one(index: int, plan: RunPlan) -> tuple[int, RunRecord]:
    return index, Simulation(plan).run()
