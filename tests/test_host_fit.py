"""An asynchronous engine's log tells the host's time from the device's, though each line shows another batch's."""

import numpy as np
import pandas as pd
import pytest

from calibrate.fit.host_fit import HOST_TERMS, HostFit
from calibrate.fit.iteration_fit import TermFit, fit_best, term_parameters
from calibrate.fit.iteration_observations import observations
from sim.service_curve import IterationWork
from sim.streams import stream
from tests.test_iteration_fit import measured

SIZES = (1, 2, 4, 8, 16, 32, 64)
HOST = HostFit(terms=dict(zip(HOST_TERMS, (2e-3, 5e-5, 6e-3, 12e-3, 3e-4), strict=True)), largest_graph=SIZES[-1])
DEVICE = TermFit(
    terms={
        "per_iteration": 3e-3,
        "per_token": 6e-5,
        "per_attention_pair": 0.0,
        "per_prefill_chunk": 0.0,
        "per_decode": 2e-5,
        "per_kv_token": 1e-7,
    },
    floor_tokens=0,
    graph_sizes=SIZES,
    host=HOST,
)


def logged(noise: float = 0.0) -> pd.DataFrame:
    """Records of an engine that launches each batch while the device computes the one before."""
    records = measured()
    works = records[[*IterationWork._fields]].to_numpy(dtype=np.float64)
    device_s, host_s = DEVICE.device_s(works), HOST.predict_s(works)
    rng = stream(11, "noise")
    host_s = host_s * (1 + noise * rng.standard_normal(len(works)))
    records["elapsed_s"], records["cycle_s"] = 0.0, np.nan
    for _, rows in records.groupby("point", sort=False):
        places = list(rows.index)
        launched_s = host_s[places[0]]
        device_end_s, line_s = max(launched_s, device_s[places[0]]), np.nan
        for place, following in zip(places, [*places[1:], None], strict=True):
            start_s = launched_s
            if following is not None:
                launched_s += host_s[following]
            done_s = max(launched_s, device_end_s)
            records.loc[place, "elapsed_s"] = max(done_s - launched_s, 3e-5)
            records.loc[place, "cycle_s"] = done_s - line_s
            line_s = launched_s = done_s
            if following is not None:  # the device works on what is launched already
                device_end_s = max(done_s, max(device_end_s, start_s) + device_s[following])
    return records


def test_both_are_found() -> None:
    fit = fit_best(observations(logged(), asynchronous=True), graph_sizes=SIZES)
    assert fit.host is not None
    assert fit.host.terms == pytest.approx(HOST.terms, rel=0.1, abs=2e-5)
    works = np.array(
        [
            (0, 0, 0.0, 0, 1, 200),
            (0, 0, 0.0, 0, 32, 20_000),
            (40, 1, 820.0, 40, 8, 1600),  # the host's
            (480, 1, 115_440.0, 480, 8, 1600),  # the device's
        ],
        dtype=np.float64,
    )
    assert fit.predict_s(works) == pytest.approx(DEVICE.predict_s(works), rel=0.05)


def test_intervals_hold_the_host_and_a_profile_has_them() -> None:
    _, parameters = term_parameters(observations(logged(0.05), asynchronous=True), graph_sizes=SIZES, resamples=20)
    assert parameters.host is not None
    assert parameters.host.in_pieces.value == pytest.approx(6e-3, rel=0.15)
    for _, found in parameters.host:
        assert found.low <= found.value <= found.high


def test_a_synchronous_engine_has_no_host_part() -> None:
    fit = fit_best(observations(measured()))
    assert fit.host is None


def test_what_the_next_launch_hides_is_left_out() -> None:
    records = logged()
    seen = observations(records, asynchronous=True)
    assert len(seen.measured_s) < len(observations(records).measured_s)
