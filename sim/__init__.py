"""Predict LLM fleets: Llama experts behind a prompt router, simulated iteration by iteration.

from sim import load_fleet, simulate

result = simulate(load_fleet("fleet.yaml"))
result.summary  # a pandas frame
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.fleet_file import FleetFileError, load_fleet, parse_fleet
    from sim.result import Result
    from sim.run import simulate

__all__ = ["FleetFileError", "Result", "load_fleet", "parse_fleet", "simulate"]

_HOMES = {
    "FleetFileError": "sim.fleet_file",
    "Result": "sim.result",
    "load_fleet": "sim.fleet_file",
    "parse_fleet": "sim.fleet_file",
    "simulate": "sim.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``expert-router --help`` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
