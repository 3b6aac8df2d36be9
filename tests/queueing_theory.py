"""Textbook queues, to judge the simulator by.

Waits end where service starts; responses include service. All are means of the steady state, in seconds.

Sources:
    Kleinrock, Queueing Systems, volume 1 (1975): M/M/1 section 3.2, M/M/c section 3.5, M/G/1 section 5.6.
    Kleinrock, Queueing Systems, volume 2 (1976): processor sharing, section 4.4.
    Reiser and Lavenberg, Mean-value analysis of closed multichain queuing networks, J. ACM 27(2), 1980.
    Buzen, Computational algorithms for closed queueing networks with exponential servers, C. ACM 16(9), 1973.
    Baskett, Chandy, Muntz and Palacios, Open, closed, and mixed networks of queues, J. ACM 22(2), 1975 (BCMP).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


def _utilization(arrival_rps: float, service_s: float, servers: int = 1) -> float:
    utilization = arrival_rps * service_s / servers
    if not utilization < 1:
        raise ValueError(f"no steady state: utilization is {utilization:g}; lower arrival_rps or service_s")
    return utilization


# ---------------------------------------------------------------------------------------------------- open queues


def erlang_c(arrival_rps: float, service_s: float, servers: int) -> float:
    """Return the probability that an arrival of an M/M/c queue waits (Kleinrock 1, section 3.5)."""
    utilization = _utilization(arrival_rps, service_s, servers)
    offered = arrival_rps * service_s
    blocked = 1.0  # Erlang B by its recursion over servers, which no factorial overflows
    for c in range(1, servers + 1):
        blocked = offered * blocked / (c + offered * blocked)
    return blocked / (1 - utilization * (1 - blocked))


def erlang_c_wait_s(arrival_rps: float, service_s: float, servers: int) -> float:
    """Return the wait of an M/M/c queue, first come first served (Kleinrock 1, section 3.5)."""
    return erlang_c(arrival_rps, service_s, servers) / (servers / service_s - arrival_rps)


def mm1_wait_s(arrival_rps: float, service_s: float) -> float:
    """Return the wait of an M/M/1 queue (Kleinrock 1, section 3.2)."""
    utilization = _utilization(arrival_rps, service_s)
    return utilization * service_s / (1 - utilization)


def mm1_response_s(arrival_rps: float, service_s: float) -> float:
    """Return the response of an M/M/1 queue (Kleinrock 1, section 3.2)."""
    return service_s / (1 - _utilization(arrival_rps, service_s))


def mg1_wait_s(arrival_rps: float, service_s: float, service_cv: float) -> float:
    """Return the wait of an M/G/1 queue: Pollaczek-Khinchine (Kleinrock 1, section 5.6).

    ``service_cv`` is the standard deviation of the service time over its mean.
    """
    utilization = _utilization(arrival_rps, service_s)
    return utilization * service_s * (1 + service_cv**2) / (2 * (1 - utilization))


def md1_wait_s(arrival_rps: float, service_s: float) -> float:
    """Return the wait of a queue with constant service time."""
    return mg1_wait_s(arrival_rps, service_s, service_cv=0.0)


def mg1_ps_response_s(arrival_rps: float, service_s: float) -> float:
    """Return the response of M/G/1 processor sharing, whatever the service distribution (Kleinrock 2, section 4.4)."""
    return service_s / (1 - _utilization(arrival_rps, service_s))


# ------------------------------------------------------------------------------------------------ closed networks


class ClosedNetwork(NamedTuple):
    """A closed network in steady state.

    Attributes:
        throughput_rps: requests per second.
        response_s: all stations together, think time not included.
    """

    throughput_rps: float
    response_s: float


class Station(NamedTuple):
    """A queue of a closed network: ``servers`` in parallel, each needing ``service_s`` a request."""

    service_s: float
    servers: int = 1


def mva(users: int, think_s: float, services_s: Sequence[float]) -> ClosedNetwork:
    """Return exact mean value analysis of users who think and pass single-server stations (Reiser and Lavenberg).

    Stations are first come first served with exponential service, or processor sharing with any (BCMP). Only the mean
    of the think time matters.
    """
    service_s = np.array(services_s)
    at_station = np.zeros(len(service_s))  # mean number there, with one user less: what an arrival finds
    throughput_rps = response_s = 0.0
    for population in range(1, users + 1):
        responses_s = service_s * (1 + at_station)
        response_s = float(responses_s.sum())
        throughput_rps = population / (think_s + response_s)
        at_station = throughput_rps * responses_s
    return ClosedNetwork(throughput_rps, response_s)


def closed_network(users: int, think_s: float, stations: Sequence[Station]) -> ClosedNetwork:
    """Return the exact solution with stations of several servers, by the normalising constant (Buzen).

    Holds where ``mva`` does. Load-dependent mean value analysis gives the same, but loses the probability of an empty
    station to cancellation near saturation; here every term is positive, and kept as a logarithm.
    """
    counts = np.arange(1, users + 1)
    with np.errstate(divide="ignore"):  # no think time: the think station is empty, log 0
        log_constant = np.concatenate([[0.0], np.cumsum(np.log(think_s) - np.log(counts))])
    for service_s, servers in stations:
        log_terms = np.concatenate([[0.0], np.cumsum(np.log(service_s) - np.log(np.minimum(counts, servers)))])
        log_constant = _log_convolve(log_constant, log_terms)
    throughput_rps = float(np.exp(log_constant[-2] - log_constant[-1]))
    return ClosedNetwork(throughput_rps, users / throughput_rps - think_s)


def _log_convolve(log_a: NDArray[np.float64], log_b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm of the first terms of the convolution of two positive sequences of equal length."""
    return np.array([np.logaddexp.reduce(log_a[: n + 1] + log_b[n::-1]) for n in range(len(log_a))])
