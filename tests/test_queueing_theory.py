import itertools
import math

import numpy as np
import pytest

from tests.queueing_theory import (
    ClosedNetwork,
    Station,
    closed_network,
    erlang_c,
    erlang_c_wait_s,
    md1_wait_s,
    mg1_ps_response_s,
    mg1_wait_s,
    mm1_response_s,
    mm1_wait_s,
    mva,
)


def test_erlang_c_of_the_eye_clinic() -> None:
    # Gross and Harris, Fundamentals of Queueing Theory, section 2.3: 3 doctors, 6 patients/h, 20 min each:
    # 8/9 of a patient waits on average, and a visit takes 28.9 min.
    wait_s = erlang_c_wait_s(6 / 3600, 1200, 3)
    assert wait_s * 6 / 3600 == pytest.approx(8 / 9)
    assert (wait_s + 1200) / 60 == pytest.approx(28.9, abs=0.05)


@pytest.mark.parametrize(
    ("offered", "servers", "probability"),
    [(0.5, 1, 0.5), (1.0, 2, 1 / 3), (4.0, 5, 0.5541), (10.0, 12, 0.4494), (90.0, 100, 0.2169)],
)
def test_erlang_c_is_its_definition(offered: float, servers: int, probability: float) -> None:
    last = offered**servers / math.factorial(servers) / (1 - offered / servers)
    by_definition = last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)
    assert erlang_c(offered, 1.0, servers) == pytest.approx(by_definition)
    assert erlang_c(offered, 1.0, servers) == pytest.approx(probability, abs=1e-4)


def test_mm2_wait_has_its_closed_form() -> None:
    utilization = 0.7
    assert erlang_c_wait_s(1.4, 1.0, 2) == pytest.approx(utilization**2 / (1 - utilization**2))


def test_mm1_at_half_load_waits_one_service_time() -> None:
    assert mm1_wait_s(0.5, 1.0) == pytest.approx(1.0)
    assert mm1_response_s(0.5, 1.0) == pytest.approx(2.0)
    assert erlang_c_wait_s(0.5, 1.0, 1) == pytest.approx(mm1_wait_s(0.5, 1.0))


def test_pollaczek_khinchine_is_mm1_for_cv_1_and_half_of_it_for_constant_service() -> None:
    assert mg1_wait_s(8.0, 0.1, 1.0) == pytest.approx(mm1_wait_s(8.0, 0.1))
    assert md1_wait_s(8.0, 0.1) == pytest.approx(mm1_wait_s(8.0, 0.1) / 2)
    assert mg1_wait_s(8.0, 0.1, 3.0) == pytest.approx(5 * mm1_wait_s(8.0, 0.1))


def test_processor_sharing_responds_as_mm1() -> None:
    assert mg1_ps_response_s(0.9, 1.0) == pytest.approx(10.0)


def test_overload_has_no_steady_state() -> None:
    with pytest.raises(ValueError, match="no steady state: utilization is 1; lower arrival_rps or service_s"):
        erlang_c_wait_s(4.0, 0.5, 2)


def by_birth_and_death(users: int, think_s: float, service_s: float, servers: int) -> ClosedNetwork:
    """One station as a birth-death chain over the number of requests there (the machine-repair model)."""
    weights = [1.0]
    for there in range(1, users + 1):
        weights.append(weights[-1] * (users - there + 1) / think_s * service_s / min(there, servers))
    probability = np.array(weights) / sum(weights)
    throughput_rps = float(probability @ np.minimum(np.arange(users + 1), servers)) / service_s
    return ClosedNetwork(throughput_rps, users / throughput_rps - think_s)


@pytest.mark.parametrize(("users", "servers"), [(1, 1), (2, 1), (20, 1), (20, 4), (30, 30), (5, 8)])
def test_one_station_is_the_machine_repair_model(users: int, servers: int) -> None:
    expected = by_birth_and_death(users, 3.0, 0.5, servers)
    assert closed_network(users, 3.0, [Station(0.5, servers)]) == pytest.approx(expected)
    if servers == 1:
        assert mva(users, 3.0, [0.5]) == pytest.approx(expected)


def test_mva_of_a_time_sharing_system() -> None:
    # Lazowska, Zahorjan, Graham and Sevcik, Quantitative System Performance (1984), chapter 6: CPU and two disks
    # with demands of 0.605, 2.1 and 1.35 s, 15 s of think time, 3 terminals.
    network = mva(3, 15.0, [0.605, 2.1, 1.35])
    assert network.throughput_rps == pytest.approx(0.152, abs=0.0005)


def test_several_stations_are_the_sum_over_all_states() -> None:
    users, think_s, stations = 4, 2.0, [Station(0.3), Station(0.9, 2), Station(0.5, 3)]

    def constant(population: int) -> float:
        total = 0.0
        for there in itertools.product(range(population + 1), repeat=len(stations)):
            thinking = population - sum(there)
            if thinking >= 0:
                weight = think_s**thinking / math.factorial(thinking)
                for count, (service_s, servers) in zip(there, stations, strict=True):
                    weight *= math.prod(service_s / min(k, servers) for k in range(1, count + 1))
                total += weight
        return total

    throughput_rps = constant(users - 1) / constant(users)
    expected = ClosedNetwork(throughput_rps, users / throughput_rps - think_s)
    assert closed_network(users, think_s, stations) == pytest.approx(expected)


def test_closed_network_of_single_servers_is_mva() -> None:
    services_s = [0.1, 0.05, 0.2]
    stations = [Station(service_s) for service_s in services_s]
    assert closed_network(50, 4.0, stations) == pytest.approx(mva(50, 4.0, services_s))


def test_saturation_is_the_slowest_station_and_an_idle_network_has_no_wait() -> None:
    assert closed_network(2000, 10.0, [Station(0.5, 8), Station(0.01)]).throughput_rps == pytest.approx(16.0)
    assert closed_network(1, 10.0, [Station(0.5, 8), Station(0.01)]).response_s == pytest.approx(0.51)


def test_no_think_time_keeps_all_users_at_the_stations() -> None:
    assert closed_network(6, 0.0, [Station(0.5, 2)]) == pytest.approx(ClosedNetwork(4.0, 1.5))
    assert mva(6, 0.0, [0.5]) == pytest.approx(ClosedNetwork(2.0, 3.0))
