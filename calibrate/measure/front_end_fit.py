"""What a request and its tokens cost in an engine's front end, as users meet it.

The simulated front end works on requests one after another, and on streamed tokens in between. Its work on a request
is what the entries of simultaneous requests into the engine show (``calibrate.measure.engine_entry``); its work on a
token, how much later after an iteration's log line users have its tokens when it has more of them. Where front end
and engine share cores that is more than CPU time, and it is what users wait. The work per prompt token, too little to
be seen so, is CPU time of the API server process. What an idle request waits beyond all this and its iteration is the
delay. And where they share cores the engine waits as well: iterations of decodes in which a request comes or leaves
take longer than their neighbours.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from calibrate.fit.iteration_fit import CONFIDENCE, TermFit
from calibrate.fit.iteration_observations import Floats
from calibrate.measure.engine_entry import EntrySample, fit_entry
from calibrate.measure.files import MeasuredPoint
from calibrate.measure.iteration_records import admissions, lines_of, sent_of
from sim.fleet import EngineSettings
from sim.profile import FrontEndCosts, Parameter
from sim.service_curve import IterationWork
from sim.streams import stream

FEWEST_POINTS = 4
FEWEST_TOGETHER = 4
"""Requests of a point from which on their entries tell of the work on one."""
FEWEST_QUIET = 4
"""Iterations of a point in which no request came or left, from which on the others tell what that takes."""
RESAMPLES = 30
"""Refits to resampled points, for the intervals."""


def fit_front_end(
    points: Sequence[MeasuredPoint],
    requests: pd.DataFrame,
    iterations: pd.DataFrame,
    settings: EngineSettings,
    fitted: TermFit,
    *,
    shares_cores: bool,
) -> FrontEndCosts | None:
    """Return the front end's costs; None when too little was measured.

    Args:
        points: finished ones.
        requests: of all points, SENT_COLUMNS.
        iterations: likewise, ITERATION_COLUMNS.
        settings: of the engine.
        fitted: to its iterations.
        shares_cores: front end and engine are confined to the same cores, so that the front end's work on tokens is
            part of what an iteration takes, and its work on a request makes the iteration longer in which it falls;
            where they are not, a token takes at least its CPU time besides.
    """
    samples = [(label, sample) for label, sample in _samples(requests, iterations, settings)]
    together = [sample for _, sample in samples if len(sample.sent) >= FEWEST_TOGETHER]
    idle = [
        _IdleSample(sample, _engine_s(sample, iterations, fitted, asynchronous=settings.async_scheduling))
        for label, sample in samples
        if _is_idle(label)
    ]
    if len(together) < FEWEST_POINTS or not idle:
        return None
    extra = []
    if shares_cores and not settings.async_scheduling:
        # Closed-loop points are a check of all this, and kept out.
        extra = [
            each
            for label, sample in samples
            if not label.startswith("closed") and len((each := _extra_times(sample, iterations, fitted)).coming)
        ]
    parts: tuple[Sequence[Any], ...] = together, [sample for _, sample in samples], idle, list(points), extra
    found = _costs(*parts, shares_cores=shares_cores)
    if found is None:
        return None
    refits = [found]
    for number in range(RESAMPLES):
        rng = stream(0, "front end", number)
        chosen = [[part[index] for index in rng.integers(len(part), size=len(part))] if part else [] for part in parts]
        drawn = _costs(*chosen, shares_cores=shares_cores)
        refits += [drawn] if drawn is not None else []
    low, high = np.quantile(refits, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    names = ["delay_s", "per_request_s", "per_prompt_token_s", "per_output_token_s"]
    if extra:
        names.append("per_request_engine_s")
    values = {
        name: Parameter(
            value=_digits(value), low=min(_digits(lo), _digits(value)), high=max(_digits(hi), _digits(value))
        )
        for name, value, lo, hi in zip(names, found, low, high, strict=False)
    }
    return FrontEndCosts(**values)


@dataclass(frozen=True, slots=True)
class _IdleSample:
    """Requests one at a time, and how long the engine took for the first token of each; NaN where not known."""

    sample: EntrySample
    engine_s: list[float]


def _is_idle(label: str) -> bool:
    return label.startswith("idle")


def _engine_s(sample: EntrySample, iterations: pd.DataFrame, fitted: TermFit, *, asynchronous: bool) -> list[float]:
    """What the engine took for each request's first token: by its log; an asynchronous one's, as the fit says.

    A fit of the whole is off by more at one place than a front end takes.
    """
    records = iterations[iterations["point"] == sample.sent[0].point]
    works = records[[*IterationWork._fields]].to_numpy(dtype=np.float64)
    # From when the engine waits for the model to the log line; besides, it schedules and hands out what it made.
    besides_s = float((records["cycle_s"] - records["elapsed_s"]).median())
    ends_s = [line.ended_s for line in sample.lines]
    taken_s = []
    for request, number in zip(sample.sent, sample.admitted, strict=True):
        last = max(bisect_right(ends_s, request.first_token_s) - 1, number or 0)
        if number is None:
            taken_s.append(nan)
        elif asynchronous:
            taken_s.append(float(fitted.predict_s(works[number : last + 1]).sum()))
        else:
            taken_s.append(ends_s[last] - ends_s[number] + sample.lines[number].elapsed_s + besides_s)
    return taken_s


@dataclass(frozen=True, slots=True)
class _ExtraTimes:
    """Seconds by which decode-only iterations of a point took longer than its others: those with one request's coming.

    Attributes:
        coming: in which one request was sent and none ended.
        leaving: in which one ended and none was sent.
    """

    coming: Floats
    leaving: Floats


def _extra_times(sample: EntrySample, iterations: pd.DataFrame, fitted: TermFit) -> _ExtraTimes:
    records = iterations[iterations["point"] == sample.sent[0].point]
    decodes = records[(records["prefill_chunks"] == 0) & (records["cycle_s"] > 0)]
    ends_s, cycle_s = decodes["ended_s"].to_numpy(), decodes["cycle_s"].to_numpy()
    coming, leaving = (
        np.searchsorted(times_s, ends_s) - np.searchsorted(times_s, ends_s - cycle_s)
        for times_s in (
            np.sort([request.sent_s for request in sample.sent]),
            np.sort([request.last_token_s for request in sample.sent]),
        )
    )
    expected_s = fitted.predict_s(decodes[[*IterationWork._fields]].to_numpy(dtype=np.float64))
    quiet = (coming == 0) & (leaving == 0)
    if quiet.sum() < FEWEST_QUIET:
        return _ExtraTimes(np.empty(0), np.empty(0))
    # Beside its neighbours: the fit may be off here, and the machine faster or slower just now.
    extra_s = cycle_s - expected_s * np.median(cycle_s[quiet] / expected_s[quiet])
    return _ExtraTimes(extra_s[(coming == 1) & (leaving == 0)], extra_s[(coming == 0) & (leaving == 1)])


def _request_engine_s(extra: Sequence[_ExtraTimes]) -> float:
    """Return what a request takes from a busy engine, when it comes and when it leaves together; 0 where not known."""
    parts = (np.concatenate([getattr(each, name) for each in extra] or [[]]) for name in ("coming", "leaving"))
    return sum(max(0.0, float(np.median(part))) for part in parts if len(part))


def _costs(
    together: Sequence[EntrySample],
    everything: Sequence[EntrySample],
    idle: Sequence[_IdleSample],
    points: Sequence[MeasuredPoint],
    extra: Sequence[_ExtraTimes],
    *,
    shares_cores: bool,
) -> Floats | None:
    """Return delay, the work on a request, a prompt and an output token, and what a request takes from the engine.

    None without idle requests.
    """
    per_request_s = fit_entry(together).per_request_s
    cpu_request_s, per_prompt_token_s, cpu_output_token_s = _cpu_s(points)
    per_output_token_s = _token_work_s(everything)
    if not shares_cores:
        # Log lines of a busy front end come late as well, so that its users' delay after them tells too little.
        per_output_token_s = max(per_output_token_s, cpu_output_token_s)
    waits_s = [
        request.first_token_s
        - request.sent_s
        - engine_s
        - (per_prompt_token_s * request.prompt_tokens + per_output_token_s)
        for each in idle
        for request, engine_s in zip(each.sample.sent, each.engine_s, strict=True)
        if not isnan(engine_s)
    ]
    if not waits_s:
        return None
    wait_s = max(0.0, float(np.median(waits_s)))
    # Where a busy engine takes the front end's core, work takes longer than it does for an idle request; never less
    # than its CPU time.
    per_request_s = max(cpu_request_s, min(per_request_s, wait_s))
    delay_s = max(0.0, wait_s - per_request_s)
    return np.array([delay_s, per_request_s, per_prompt_token_s, per_output_token_s, _request_engine_s(extra)])


def _samples(
    requests: pd.DataFrame, iterations: pd.DataFrame, settings: EngineSettings
) -> Iterator[tuple[str, EntrySample]]:
    """Yield label and requests of each point that is understood."""
    for label, rows in iterations.groupby("point", sort=False):
        if not rows["matched"].all():
            continue
        lines = lines_of(rows)
        sent = sorted(sent_of(requests[requests["point"] == label]), key=lambda request: request.sent_s)
        if sent:
            admitted = admissions(lines, sent, settings)
            yield str(label), EntrySample(lines=lines, sent=sent, admitted=admitted, settings=settings)


def _token_work_s(samples: Sequence[EntrySample]) -> float:
    """Return the slope of token delays over the number of tokens that an iteration made."""
    tokens: list[int] = []
    delays_s: list[float] = []
    for sample in samples:
        ends_s = [line.ended_s for line in sample.lines]
        for request in sample.sent:
            for received_s in (request.first_token_s, request.last_token_s):
                number = bisect_right(ends_s, received_s) - 1
                if number >= 0:
                    line = sample.lines[number]
                    tokens.append(line.context_requests + line.generation_requests)
                    delays_s.append(received_s - ends_s[number])
    if not tokens:
        return 0.0
    frame = pd.DataFrame({"tokens": tokens, "delay_s": delays_s}).groupby("tokens")["delay_s"].agg(["median", "size"])
    counts = frame.index.to_numpy(dtype=np.float64)
    weight: Floats = np.sqrt(frame["size"].to_numpy(dtype=np.float64)) / (counts + 4)
    rows = np.column_stack([np.ones(len(counts)), counts]) * weight[:, None]
    values, _ = nnls(rows, frame["median"].to_numpy() * weight)
    return float(values[1])


def _cpu_s(points: Sequence[MeasuredPoint]) -> tuple[float, float, float]:
    """Return CPU seconds of the API server a request, a prompt and an output token; 0 where they were not measured."""
    told = [point for point in points if point.front_end_cpu_s is not None]
    if len(told) < FEWEST_POINTS:
        return 0.0, 0.0, 0.0
    counts = np.array([[p.requests, p.prompt_tokens, p.output_tokens, p.iterations] for p in told], dtype=np.float64)
    spent_s = np.array([p.front_end_cpu_s for p in told], dtype=np.float64)
    weight = 1 / np.maximum(spent_s, 1e-3)  # relative, or the largest points would decide alone
    rows = counts * weight[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    costs = nnls(rows / scale, spent_s * weight)[0] / scale
    return float(costs[0]), float(costs[1]), float(costs[2])


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
