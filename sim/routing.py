"""The router's decisions for one fleet: what a prompt is taken for, and which replica gets it."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from sim.fleet import Fleet
from sim.policies import REPLICA_POLICIES, Pool, by_class, by_class_with_spill_over
from sim.replica import Replica
from sim.request import Request
from sim.spec import RouterSpec
from sim.streams import stream


def replica_choice(fleet: Fleet, by_expert: Sequence[Sequence[Replica]], seed: int) -> Callable[[Request], Replica]:
    """Return the router's policy, applied to this fleet."""
    spec = fleet.router
    if spec is None:
        only = by_expert[0][0]
        return lambda request: only
    uniform = stream(seed, "policy").random
    if spec.policy in REPLICA_POLICIES:
        everywhere = Pool([replica for replicas in by_expert for replica in replicas])
        pick = REPLICA_POLICIES[spec.policy]
        return lambda request: pick(everywhere, uniform)
    among = REPLICA_POLICIES[spec.replica_policy]
    pools = [Pool(replicas) for replicas in by_expert]
    class_map = fleet.class_map
    if spec.policy == "class":
        return lambda request: among(pools[by_class(class_map[request.routed_class_index])], uniform)
    saturated_at = [spec.spill_over_outstanding or expert.engine.max_num_seqs for expert in fleet.experts]
    return lambda request: among(
        pools[by_class_with_spill_over(class_map[request.routed_class_index], pools, saturated_at)], uniform
    )


def confusion(spec: RouterSpec | None, classes: Sequence[str], seed: int) -> Callable[[Request], int] | None:
    """Return what the classifier takes a request for, drawn by its class; None when it is always right."""
    if spec is None or (spec.accuracy == 1.0 and spec.confusion is None) or len(classes) == 1:
        return None
    names = list(classes)
    others = len(names) - 1
    rows = []
    for name in names:
        given = (spec.confusion or {}).get(name)
        if given is None:
            weights = [spec.accuracy if other == name else (1 - spec.accuracy) / others for other in names]
        else:
            weights = [given.get(other, 0.0) for other in names]
        rows.append(list(accumulate(weight / sum(weights) for weight in weights)))
    uniform = stream(seed, "confusion").random

    def routed(request: Request) -> int:
        return min(int(np.searchsorted(rows[request.class_index], uniform(), side="right")), others)

    return routed
