"""Whether the fleets of a file can work at all: said before anything runs, all mistakes at once, with the numbers."""

import math
from collections.abc import Iterable, Sequence

from sim.expert_checks import check_expert
from sim.fleet_file import FleetFileError, LoadedFleetFile
from sim.mistakes import Mistakes, did_you_mean
from sim.resolve import engine_limits, experts_of_classes, routes_by_class
from sim.spec import (
    ClosedLoop,
    Distribution,
    Empirical,
    Exponential,
    Fixed,
    FleetFile,
    FleetSpec,
    Lognormal,
    OpenLoop,
    RouterSpec,
    Trace,
    Uniform,
    UserGrid,
)
from sim.traces import TraceError, read_workload_data
from sim.traffic import WorkloadData
from sim.yaml_tree import NOWHERE, Path


def check_feasible(file: FleetFile, data: WorkloadData | None = None) -> None:
    """Check that every fleet of a file can serve its workload.

    Args:
        file: from ``load_fleet``, so that mistakes name lines, or built in Python.
        data: what ``read_workload_data`` returned for the file's workload; None: read here.

    Raises:
        FleetFileError: with every mistake found, one line each.
    """
    mistakes = Mistakes(file.where if isinstance(file, LoadedFleetFile) else lambda path: NOWHERE)
    if data is None:
        try:
            data = read_workload_data(file.workload)
        except TraceError as error:
            raise FleetFileError([f"workload: {error}"]) from None
    _check_workload(file, mistakes)
    _check_run(file, mistakes)
    longest = _longest_requests(file, data, mistakes)
    for name, fleet in file.fleets.items():
        path: Path = ("fleets", name)
        _check_shape(fleet, path, mistakes)
        reaching = _check_class_map(file, fleet, path, mistakes)
        if fleet.router is not None:
            _check_router(file, fleet.router, (*path, "router"), mistakes)
        _check_outages(fleet, path, mistakes)
        known = [check_expert(each, (*path, "experts", key), mistakes) for key, each in fleet.experts.items()]
        if all(known):
            _check_lengths(fleet, reaching, longest, path, mistakes)
    mistakes.raise_if_any()


# ------------------------------------------------------------------------------------------------ workload and run


def _check_workload(file: FleetFile, mistakes: Mistakes) -> None:
    load = file.workload.load
    at: Path = ("workload", "load")
    if isinstance(load, ClosedLoop) and isinstance(load.users, UserGrid) and load.users.stop < load.users.start:
        mistakes.add((*at, "users", "stop"), f"must be >= start ({load.users.start}), got {load.users.stop}")
    if isinstance(load, ClosedLoop) and isinstance(load.users, list):
        _check_repeats(load.users, (*at, "users"), mistakes)
    if isinstance(load, OpenLoop) and isinstance(load.rate_rps, list):
        _check_repeats(load.rate_rps, (*at, "rate_rps"), mistakes)
    if isinstance(load, Trace):
        return
    for name, spec in file.workload.classes.items():
        for field in ("prompt_tokens", "output_tokens"):
            smallest = _smallest(getattr(spec, field))
            if smallest < 1:
                problem = f"a request has at least 1 token, got {smallest:g}"
                mistakes.add(("workload", "classes", name, field), problem)


def _check_repeats(loads: Sequence[float], at: Path, mistakes: Mistakes) -> None:
    for value in sorted({value for value in loads if loads.count(value) > 1}):
        mistakes.add(at, f"lists {value:g} more than once")


def _smallest(lengths: Distribution) -> float:
    """The smallest value; 1 for the distributions that are rounded up to one token."""
    if isinstance(lengths, Fixed):
        return lengths.value
    return lengths.min if isinstance(lengths, Uniform) else 1


def _check_run(file: FleetFile, mistakes: Mistakes) -> None:
    run = file.run
    if run.requests_per_user is not None and not isinstance(file.workload.load, ClosedLoop):
        problem = f"has no meaning: a load of kind {file.workload.load.kind} has no users"
        mistakes.add(("run", "requests_per_user"), problem, ", give requests or duration_s")
    if run.duration_s is not None and run.warm_up_s is not None and run.warm_up_s >= run.duration_s:
        problem = f"{run.warm_up_s:g} s of warm-up leave nothing of a run of {run.duration_s:g} s"
        mistakes.add(("run", "warm_up_s"), problem)
    slo = file.slo
    if slo is not None and slo.ttft_ms is None and slo.tpot_ms is None and slo.e2el_ms is None:
        mistakes.add(("slo",), "bounds nothing", ", give at least one of ttft_ms, tpot_ms, e2el_ms")


# --------------------------------------------------------------------------------------------- fleet, classes, router


def _check_shape(fleet: FleetSpec, path: Path, mistakes: Mistakes) -> None:
    if fleet.router is not None:
        return
    if len(fleet.experts) > 1:
        problem = f"{len(fleet.experts)} experts ({', '.join(fleet.experts)}) need a router to choose between them"
        mistakes.add((*path, "router"), problem, ", add 'router: {}'")
        return
    name, expert = next(iter(fleet.experts.items()))
    if expert.replicas > 1:
        problem = f"{expert.replicas} replicas need a router to choose between them"
        mistakes.add((*path, "experts", name, "replicas"), problem, ", add 'router: {}' to the fleet")


def _check_class_map(file: FleetFile, fleet: FleetSpec, path: Path, mistakes: Mistakes) -> dict[str, set[str]]:
    """Check the class map; return for each expert the classes whose prompts can reach it."""
    classes = list(file.workload.classes)
    for name, experts in (fleet.class_map or {}).items():
        at = (*path, "class_map", name)
        if name not in classes:
            mistakes.add(at, f"unknown class {name!r}", did_you_mean(name, classes))
        if not experts:
            mistakes.add(at, "is empty, needs at least one expert", f", known: {', '.join(fleet.experts)}")
        for expert in experts:
            if expert not in fleet.experts:
                mistakes.add(at, f"unknown expert {expert!r}", did_you_mean(expert, fleet.experts))
        for expert in sorted({expert for expert in experts if experts.count(expert) > 1}):
            mistakes.add(at, f"names expert {expert!r} more than once")
    if not routes_by_class(fleet):
        return {expert: set(classes) for expert in fleet.experts}
    served = experts_of_classes(fleet, classes)
    for name, experts in served.items():
        if experts or name in (fleet.class_map or {}):
            continue
        if fleet.class_map is not None:
            mistakes.add((*path, "class_map"), f"no expert serves class {name!r}", f", add '{name}: [EXPERT]'")
        else:
            problem = f"no expert serves class {name!r}: without class_map an expert serves the class of its own name"
            mistakes.add((*path, "experts"), problem, f", known: {', '.join(fleet.experts)}")
    spills = fleet.router is not None and fleet.router.policy == "class_with_spill_over"
    reaching: dict[str, set[str]] = {expert: set() for expert in fleet.experts}
    for name in classes:
        for routed in _routed_as(name, classes, fleet.router):
            experts = served.get(routed, [])
            for expert in experts if spills else experts[:1]:
                reaching.setdefault(expert, set()).add(name)
    return reaching


def _routed_as(name: str, classes: list[str], router: RouterSpec | None) -> Iterable[str]:
    """The classes that the router may take a prompt of this class for."""
    if router is not None and name in (router.confusion or {}):
        return [routed for routed, weight in (router.confusion or {})[name].items() if weight > 0]
    return classes if router is not None and router.accuracy < 1 else [name]


def _check_router(file: FleetFile, router: RouterSpec, path: Path, mistakes: Mistakes) -> None:
    classes = list(file.workload.classes)
    # A default spelled out says nothing, so that a resolved file can be simulated again.
    given = {name for name, value in router if value != type(router).model_fields[name].default}
    if "spill_over_outstanding" in given and router.policy != "class_with_spill_over":
        problem = f"has no meaning with policy {router.policy}"
        mistakes.add((*path, "spill_over_outstanding"), problem, ", it belongs to class_with_spill_over")
    if router.policy not in ("class", "class_with_spill_over"):
        for field in ("replica_policy", "accuracy", "confusion"):
            if field in given:
                problem = f"has no meaning with policy {router.policy}, which ignores classes"
                mistakes.add((*path, field), problem, ", remove it (null removes an inherited one)")
        return
    if router.accuracy < 1 and len(classes) == 1:
        problem = f"is {router.accuracy:g}, but with one class ({classes[0]}) there is no other to mistake it for"
        mistakes.add((*path, "accuracy"), problem)
    for name, weights in (router.confusion or {}).items():
        at = (*path, "confusion", name)
        if name not in classes:
            mistakes.add(at, f"unknown class {name!r}", did_you_mean(name, classes))
        for routed in weights:
            if routed not in classes:
                mistakes.add((*at, routed), f"unknown class {routed!r}", did_you_mean(routed, classes))
        if not any(weight > 0 for weight in weights.values()):
            mistakes.add(at, "has no weight above 0: prompts of this class would go nowhere")


def _check_outages(fleet: FleetSpec, path: Path, mistakes: Mistakes) -> None:
    if fleet.outages and fleet.router is None:
        problem = "have no meaning without a router, whose health checks and second tries they are about"
        mistakes.add((*path, "outages"), problem, ", add 'router: {}' to the fleet")
    back_s: dict[tuple[str, int], float] = {}
    for place, outage in sorted(enumerate(fleet.outages), key=lambda each: each[1].at_s):
        at = (*path, "outages", place)
        if outage.expert not in fleet.experts:
            mistakes.add(
                (*at, "expert"), f"unknown expert {outage.expert!r}", did_you_mean(outage.expert, fleet.experts)
            )
            continue
        replicas = fleet.experts[outage.expert].replicas
        if outage.replica >= replicas:
            mistakes.add((*at, "replica"), f"{outage.expert} has replicas 0 to {replicas - 1}, got {outage.replica}")
        which = outage.expert, outage.replica
        if outage.at_s < back_s.get(which, 0.0):
            mistakes.add((*at, "at_s"), f"{outage.expert}/{outage.replica} is still down then, from an earlier outage")
        back_s[which] = math.inf if outage.for_s is None else outage.at_s + outage.for_s


# ------------------------------------------------------------------------------------------------------------ lengths


def _longest_requests(file: FleetFile, data: WorkloadData, mistakes: Mistakes) -> dict[str, tuple[int, str]]:
    """For each class, the most tokens (prompt and output) that one request can have, and a clause that says so.

    Unbounded lengths are a mistake, and the class is then left out.
    """
    if data.trace is not None:
        tokens = data.trace.prompt_tokens + data.trace.output_tokens
        longest = int(tokens.argmax())
        parts = f"prompt {data.trace.prompt_tokens[longest]}, output {data.trace.output_tokens[longest]}"
        what = f"the trace has a request of {tokens[longest]} ({parts})"
        return {name: (int(tokens[longest]), what) for name in file.workload.classes}
    requests = {}
    for name, spec in file.workload.classes.items():
        largest = []
        for field, lengths in (("prompt_tokens", spec.prompt_tokens), ("output_tokens", spec.output_tokens)):
            value = _largest(lengths, data)
            if math.isinf(value):
                hint = ", add max" if isinstance(lengths, Lognormal) else ", use lognormal with cv 1 and max"
                problem = f"{lengths.distribution} lengths without max can exceed every max_model_len"
                mistakes.add(("workload", "classes", name, field), problem, hint)
            else:
                largest.append(max(1, round(value)))
        if len(largest) == 2:
            parts = f"prompt up to {largest[0]}, output up to {largest[1]}"
            requests[name] = (sum(largest), f"a request of class {name!r} can have {sum(largest)} ({parts})")
            if spec.shared_prefix_tokens > largest[0]:
                problem = f"{spec.shared_prefix_tokens} exceeds the longest prompt of the class, {largest[0]} tokens"
                mistakes.add(("workload", "classes", name, "shared_prefix_tokens"), problem)
    return requests


def _largest(lengths: Distribution, data: WorkloadData) -> float:
    match lengths:
        case Fixed():
            return lengths.value
        case Uniform():
            return lengths.max
        case Exponential():
            return math.inf
        case Lognormal():
            return math.inf if lengths.max is None else lengths.max
        case Empirical():
            largest = float(data.column(lengths).max())
            return largest if lengths.max is None else min(largest, lengths.max)


def _check_lengths(
    fleet: FleetSpec, reaching: dict[str, set[str]], longest: dict[str, tuple[int, str]], path: Path, mistakes: Mistakes
) -> None:
    """Check that the longest request that can reach an expert fits its max_model_len; one line for equal experts."""
    too_short: dict[tuple[int, str], list[str]] = {}
    for name, expert in fleet.experts.items():
        limit, _, _ = engine_limits(expert)
        tokens, what = max((longest[each] for each in reaching[name] if each in longest), default=(0, ""))
        if tokens > limit:
            too_short.setdefault((limit, what), []).append(name)
    for (limit, what), names in too_short.items():
        problem = f"max_model_len of {', '.join(names)} is {limit} tokens, but {what}"
        mistakes.add((*path, "experts"), problem)
