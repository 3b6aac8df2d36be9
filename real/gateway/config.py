"""What one gateway needs to know, as a file: the part of a fleet file that it uses, and where the replicas listen."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from sim.serve_spec import ServeSpec
from sim.spec import FleetFile, RouterSpec
from sim.spec_base import Spec


class GatewayExpert(Spec):
    """One expert as the gateway sees it."""

    name: str
    served_model: str = Field(description="what the expert's own server calls its model")
    replica_urls: Annotated[list[str], Field(min_length=1)]
    saturated_at: Annotated[float, Field(gt=0)] = Field(
        description="mean number of unanswered requests per replica from which it is saturated"
    )

    @field_validator("replica_urls")
    @classmethod
    def _plain_http(cls, urls: list[str]) -> list[str]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path not in ("", "/"):
                raise ValueError(f"must look like http://HOST:PORT, got {url!r}")
            if parts.username is not None or parts.query or parts.fragment:
                raise ValueError(f"must be http://HOST:PORT and nothing more, got {url!r}")
        return urls


class GatewayConfig(Spec):
    """One gateway in front of one fleet."""

    fleet: str
    classes: Annotated[list[str], Field(min_length=1)]
    class_map: dict[str, list[str]] = Field(description="class -> experts, the preferred one first")
    experts: Annotated[list[GatewayExpert], Field(min_length=1)]
    router: RouterSpec
    serve: ServeSpec
    seed: int = 1
    request_log: str | None = Field(None, description="file that gets one JSON line a request; none: no such file")

    @property
    def routes_by_class(self) -> bool:
        """Whether the class of a prompt decides on its expert."""
        return self.router.policy in ("class", "class_with_spill_over")

    @property
    def virtual_models(self) -> tuple[str, ...]:
        """Model names that mean: route by the prompt. An expert of the same name goes first."""
        names = {expert.name for expert in self.experts}
        return tuple(name for name in dict.fromkeys(("expert-router", self.fleet)) if name not in names)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [expert.name for expert in self.experts]
        if len(set(names)) < len(names):
            raise ValueError(f"experts must have different names, got {', '.join(names)}")
        for class_name in self.classes:
            if not self.class_map.get(class_name):
                raise ValueError(f"class_map must name an expert for class {class_name!r}")
        for class_name, experts in self.class_map.items():
            for expert in experts:
                if expert not in names:
                    raise ValueError(f"class_map.{class_name} names {expert!r}, which is no expert of {self.fleet}")
        cap, workers = self.serve.limits.max_in_flight_per_replica, self.router.workers
        if cap < workers:
            raise ValueError(
                f"serve.limits.max_in_flight_per_replica must be >= router.workers, got {cap} for {workers} workers, "
                "each of which takes its share"
            )
        return self


def gateway_config(
    file: FleetFile, fleet_name: str, replica_urls: Mapping[str, Sequence[str]], *, request_log: str | None = None
) -> GatewayConfig:
    """Return the gateway of one fleet of a feasible file.

    Args:
        file: the fleet file.
        fleet_name: one of its fleets.
        replica_urls: per expert, where its replicas listen.
        request_log: a file that gets one JSON line a request.

    Raises:
        ValueError: the fleet has no router.
    """
    from sim.resolve import engine_limits, experts_of_classes, routes_by_class  # heavy, and no gateway process needs it

    fleet = file.fleets[fleet_name]
    if fleet.router is None:
        raise ValueError(f"fleets.{fleet_name} has no router, so there is no gateway to run; give it one")
    classes = list(file.workload.classes)
    everyone = list(fleet.experts)
    return GatewayConfig(
        fleet=fleet_name,
        classes=classes,
        class_map=experts_of_classes(fleet, classes) if routes_by_class(fleet) else dict.fromkeys(classes, everyone),
        experts=[
            GatewayExpert(
                name=name,
                served_model=name,
                replica_urls=list(replica_urls[name]),
                saturated_at=fleet.router.spill_over_outstanding or engine_limits(expert)[2],
            )
            for name, expert in fleet.experts.items()
        ],
        router=fleet.router,
        serve=file.serve,
        seed=file.run.seed,
        request_log=request_log,
    )


def share_of(total: int, worker: int, workers: int) -> int:
    """Return the even share of one worker, counted from 0; the shares of all add up to ``total``."""
    return total // workers + (worker < total % workers)
