"""Where real users send: a gateway or an expert that runs already, or a fleet started for them."""

import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from urllib.parse import urlsplit

from real.experts.expert_server import START_LIMIT_S
from real.serving.fleet import read_state, serving
from real.users.engine_metrics import ReplicaUrl, ask_json, engine_version
from real.users.load_client import Patience, patience
from sim.fleet import Fleet
from sim.mistakes import did_you_mean
from sim.run import loads
from sim.spec import ClosedLoop, FleetFile

OPEN_FILES_SPARE = 256
_POLL_S = 0.2
MAX_CONNECTIONS = 28_000
"""Ports that one address has for outgoing connections, as Linux comes."""


Kill = Callable[[str, int, float], None]
"""Lets a replica die: expert, replica, and for how many seconds, infinite for good; returns at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where users send.

    Attributes:
        url: of a gateway, or of the one expert of a fleet without a router.
        model: name to ask for.
        replicas: whose engines can be asked for their figures; may be none.
        kill: makes the fleet's outages; None where nobody can.
        max_in_flight: connections this process can have.
    """

    url: str
    model: str
    patience: Patience
    replicas: tuple[ReplicaUrl, ...] = ()
    api_key: str | None = None
    kill: Kill | None = None
    max_in_flight: int = 10_000


@contextmanager
def fleet_target(
    file: FleetFile,
    name: str,
    url: str | None,
    replica_urls: Mapping[str, Sequence[str]] | None,
    logs: Path,
    tell: Callable[[str], None] | None,
    kill: Kill | None = None,
) -> Iterator[Target]:
    """Yield where to send: the given address, or a fleet that is started for this and stopped afterwards.

    Raises:
        ValueError: nothing answers at the address, or nobody can make the outages of the fleet there.
    """
    if url is not None:
        if file.fleets[name].outages and kill is None:
            raise ValueError(
                f"--url {url}: fleets.{name}.outages can be made only in a fleet that is started here; leave --url out"
            )
        known = _noted_replicas(name, url, logs) if replica_urls is None else replica_urls
        yield replace(_target(file, name, url, known), kill=kill)
        return
    with serving(file, name, logs=logs, tell=tell) as served:
        known = _by_expert((each.expert, each.replica, each.url) for each in served.replicas)
        # How long it stays down is up to the supervisor and the engine.
        made = replace(_target(file, name, served.url, known), kill=lambda e, r, for_s: served.kill_replica(e, r))
        yield made


def _noted_replicas(name: str, url: str, logs: Path) -> dict[str, list[str]]:
    """Where the replicas of the fleet at ``url`` listen, if it is the one that writes its state there."""
    state = read_state(logs)
    if state is None or state["fleet"] != name or urlsplit(state["url"]).netloc != urlsplit(url).netloc:
        return {}
    return _by_expert((each["expert"], each["replica"], each["url"]) for each in state["replicas"])


def _by_expert(replicas: Iterable[tuple[str, int, str]]) -> dict[str, list[str]]:
    urls: dict[str, list[str]] = {}
    for expert, _, url in sorted(replicas):
        urls.setdefault(expert, []).append(url)
    return urls


def _target(file: FleetFile, name: str, url: str, replica_urls: Mapping[str, Sequence[str]]) -> Target:
    spec = file.fleets[name]
    experts = list(spec.experts)
    unknown = [expert for expert in replica_urls if expert not in spec.experts]
    if unknown:
        raise ValueError(f"--replica-url {unknown[0]}: no such expert{did_you_mean(unknown[0], experts)}")
    if spec.router is None and not replica_urls:
        replica_urls = {experts[0]: [url]}
    key = (os.environ.get(file.serve.api_key_env or "") or "").split(",")[0].strip() or None
    return Target(
        url=url,
        model=_model_name(url, key, name, experts, routed=spec.router is not None),
        patience=patience(file.serve.timeouts),
        replicas=tuple(
            ReplicaUrl(index, place, each)
            for index, expert in enumerate(experts)
            for place, each in enumerate(replica_urls.get(expert, ()))
        ),
        api_key=key,
        max_in_flight=_max_connections(file),
    )


def _model_name(url: str, key: str | None, fleet: str, experts: Sequence[str], *, routed: bool) -> str:
    """Ask the server what it serves and choose the name that lets a router route, or the expert's own.

    Raises:
        ValueError: nothing answers.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url {url}: expected a URL such as http://127.0.0.1:8080")
    try:
        answer = ask_json(url.rstrip("/").removesuffix("/v1") + "/v1/models", key)
        served = [str(each["id"]) for each in answer["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--url {url}: no OpenAI-compatible server answers there ({error}); start one with expert-router serve, or "
            "leave --url out to have the fleet started"
        ) from None
    wanted = [each for each in ("expert-router", fleet) if each not in experts] if routed else experts[:1]
    return next((each for each in wanted if each in served), served[0] if served else wanted[0])


def wait_until_up(fleet: Fleet, target: Target, within_s: float = START_LIMIT_S) -> bool:
    """Wait until the gateway would use every replica of the fleet; return whether that came about."""
    wanted = {expert.name: expert.replicas for expert in fleet.experts}
    deadline_s = monotonic() + within_s
    while monotonic() < deadline_s:
        try:
            if ask_json(target.url.rstrip("/") + "/ready", target.api_key)["usable_replicas"] == wanted:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it says 503 while nobody is up
        sleep(_POLL_S)
    return False


def engines_of(fleet: Fleet, target: Target) -> dict[str, str]:
    """Engine and version of each expert, as its first known replica tells."""
    told = {expert.name: "engine unknown" for expert in fleet.experts}
    for replica in reversed(target.replicas):
        told[fleet.experts[replica.expert_index].name] = engine_version(replica.url)
    return told


def _max_connections(file: FleetFile) -> int:
    """Allow this process as many open files as the system lets it, and return how many connections that makes.

    Raises:
        ValueError: fewer than the users of the highest load.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, hard - OPEN_FILES_SPARE)
    if isinstance(file.workload.load, ClosedLoop) and loads(file.workload)[-1] > most:
        raise ValueError(
            f"{loads(file.workload)[-1]:,.0f} users need as many connections and this process may have {most:,}; raise "
            "the limit with ulimit -n, or ask for fewer users"
        )
    return most
