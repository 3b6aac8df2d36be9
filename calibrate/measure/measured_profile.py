"""From a folder that ``calibrate measure`` wrote to a profile."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.fit.iteration_fit import TermFit, held_out_errors, term_parameters
from calibrate.fit.iteration_observations import Observations, TooFewRecordsError, observations
from calibrate.measure.files import MeasuredPoint, MeasurementError, MeasurementFolder, Meta
from calibrate.measure.front_end_fit import fit_front_end
from sim.catalogue import find_gpu
from sim.cuda_graphs import capture_sizes
from sim.fleet import EngineSettings
from sim.profile import FittedRange, FrontEndCosts, Profile, Residuals
from sim.resolve import profile_name
from sim.service_curve import IterationWork

LICENCE = "measured with this project on the machine named in the provenance"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredProfile:
    """A profile and what it was made of.

    Attributes:
        observed: of all points but the closed-loop ones.
        held_out: relative errors on points left out of the fit, of each point's decodes and prefills.
        check: closed-loop points, kept out of the fit: label -> relative error of all their iterations' time.
        drift: times of the reference point over their median, in order.
        matched: share of all iterations that the simulated scheduler reproduced.
    """

    profile: Profile
    fitted: TermFit
    observed: Observations
    held_out: NDArray[np.float64]
    check: dict[str, float]
    drift: list[float]
    matched: float


def fit_folder(measured: MeasurementFolder) -> MeasuredProfile:
    """Fit a profile to a measurement.

    Raises:
        MeasurementError: it has too few usable records; the message says which.
    """
    meta = measured.meta
    assert meta is not None
    sizes = graph_sizes(meta)
    settings = EngineSettings(**meta.settings)
    seen = told(measured)
    fitted, parameters = term_parameters(seen, graph_sizes=sizes)
    errors = held_out_errors(seen, fitted)
    front_end = fit_front_end(
        meta.points, measured.requests, measured.iterations, settings, fitted, shares_cores=bool(meta.cores)
    )
    profile = Profile(
        name=profile_name(
            meta.expert.model,
            meta.expert.quantization,
            meta.expert.gpu,
            meta.expert.tensor_parallel_size,
            _short(meta.expert.engine_version),
        ),
        expert=meta.expert,
        parameters=parameters,
        residuals=Residuals(
            measurements=int(seen.iterations.sum()),
            what="iterations",
            held_out=True,
            gpus=[meta.device],
            mean_error=round(float(errors.mean()), 4),
            median_absolute_error=round(float(np.median(np.abs(errors))), 4),
            p90_absolute_error=round(float(np.quantile(np.abs(errors), 0.9)), 4),
        ),
        range=FittedRange(
            max_decodes=max(1, int(seen.works[:, 4].max())),
            max_decode_kv_tokens=max(1, int(seen.works[:, 5].max())),
            max_prefill_tokens=int(seen.works[:, 0].max()),
        ),
        cuda_graph_sizes=list(sizes),
        front_end=front_end,
        num_gpu_blocks=meta.num_gpu_blocks,
        provenance=provenance(meta),
        licence=LICENCE,
    )
    return MeasuredProfile(
        profile=profile,
        fitted=fitted,
        observed=seen,
        held_out=errors,
        check=_check(measured, fitted, front_end),
        drift=drift(meta.points, decode_cycles_s(measured)),
        matched=float(measured.iterations["matched"].mean()),
    )


def told(measured: MeasurementFolder) -> Observations:
    """Return what a fit is made from: all points but the closed-loop ones.

    Raises:
        MeasurementError: there are too few usable records.
    """
    assert measured.meta is not None
    closed = measured.iterations["point"].str.startswith("closed")
    try:
        return observations(
            measured.iterations[~closed].reset_index(drop=True),
            asynchronous=measured.meta.settings["async_scheduling"],
        )
    except TooFewRecordsError as error:
        raise MeasurementError(f"{measured.folder}: {error}") from error


def graph_sizes(meta: Meta) -> tuple[int, ...]:
    """Return the batch sizes that the engine captured graphs for; none where it runs without graphs."""
    gpu = find_gpu(meta.expert.gpu)
    if meta.expert.engine.enforce_eager or gpu.kind == "cpu":
        return ()
    return capture_sizes(
        max_num_seqs=meta.settings["max_num_seqs"],
        max_num_batched_tokens=meta.settings["max_num_batched_tokens"],
        gpu=gpu,
    )


def decode_cycles_s(measured: MeasurementFolder) -> dict[str, float]:
    """Return the median cycle of decode-only iterations of each point, by label."""
    rows = measured.iterations
    rows = rows[rows["matched"] & (rows["prefill_chunks"] == 0) & rows["cycle_s"].notna()]
    return {str(label): float(cycle) for label, cycle in rows.groupby("point")["cycle_s"].median().items()}


def drift(points: Sequence[MeasuredPoint], cycle_s: dict[str, float]) -> list[float]:
    """Return how slow the machine was at each look at the reference point, 1: as usual."""
    times = [cycle_s[point.label] for point in points if point.reference and point.label in cycle_s]
    middle = float(np.median(times)) if times else 1.0
    return [time / middle for time in times]


def provenance(meta: Meta) -> str:
    """Return engine, machine, date and command in one line."""
    clocks = [point.clock_mhz for point in meta.points if point.clock_mhz is not None]
    heat = [point.temperature_c for point in meta.points if point.temperature_c is not None]
    parts = [
        f"measured by {' '.join(meta.command)} ({meta.program_version}) on {meta.date}: {meta.expert.engine_version}, "
        f"{meta.device}",
        f"confined to cores {', '.join(map(str, meta.cores))}" if meta.cores else "",
        f"{min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else "",
        f"{min(heat):.0f} to {max(heat):.0f} °C" if heat else "",
        f"{len(meta.points)} points in {meta.measured_s:.0f} s",
        f"{meta.restarts} restarts of the engine" if meta.restarts else "",
    ]
    return ", ".join(part for part in parts if part)


def _check(measured: MeasurementFolder, fitted: TermFit, front_end: FrontEndCosts | None) -> dict[str, float]:
    taken = None if front_end is None else front_end.per_request_engine_s
    found = {}
    rows = measured.iterations
    for label in rows.loc[rows["point"].str.startswith("closed"), "point"].unique():
        all_of_it = rows[rows["point"] == label]
        mine = all_of_it[all_of_it["matched"] & (all_of_it["cycle_s"] > 0)]
        if len(mine):
            predicted_s = float(fitted.predict_s(mine[[*IterationWork._fields]].to_numpy(dtype=np.float64)).sum())
            if taken is not None:
                requests = int((measured.requests["point"] == label).sum())
                predicted_s += taken.value * requests * len(mine) / len(all_of_it)
            found[str(label).partition("#")[0]] = predicted_s / float(mine["cycle_s"].sum()) - 1
    return found


def _short(engine_version: str) -> str:
    """Return ``vllm-0.32`` for "vLLM 0.32.0"."""
    name, _, version = engine_version.partition(" ")
    return f"{name.lower()}-{'.'.join(version.split('.')[:2])}" if version else name.lower()
