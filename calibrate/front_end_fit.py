"""What a request and its tokens cost in an engine's front end, as users meet it.

The simulated front end works on requests one after another, and on streamed tokens in between. Its work on a request
is what the entries of simultaneous requests into the engine show (``calibrate.engine_entry``); its work on a token,
how much later after an iteration's log line users have its tokens when it has more of them. Where front end and engine
share cores that is more than CPU time, and it is what users wait. The work per prompt token, too little to be seen so,
is CPU time of the API server process. What an idle request waits beyond all this and its iteration is the delay.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from calibrate.engine_entry import EntrySample, fit_entry
from calibrate.iteration_fit import TermFit
from calibrate.iteration_records import admissions, lines_of, sent_of
from calibrate.measurement_files import MeasuredPoint
from sim.fleet import EngineSettings
from sim.profile import FrontEndCosts, Parameter
from sim.service_curve import IterationWork
from sim.streams import stream

T = TypeVar("T")

FEWEST_POINTS = 4
RESAMPLES = 50
CONFIDENCE = 0.9
FEWEST_TOGETHER = 4
"""Requests of a point from which on their entries tell of the work on one."""


def fit_front_end(
    points: Sequence[MeasuredPoint],
    requests: pd.DataFrame,
    iterations: pd.DataFrame,
    settings: EngineSettings,
    fitted: TermFit,
) -> FrontEndCosts | None:
    """Return the front end's costs with 90 % intervals over resampled points; None when too little was measured."""
    samples = dict(_samples(requests, iterations, settings))
    together = [label for label, sample in samples.items() if len(sample.sent) >= FEWEST_TOGETHER]
    idle = {label: _idle_waits(samples[label], iterations, fitted) for label in samples if label.startswith("idle")}
    if len(together) < FEWEST_POINTS or not any(len(waits) for waits in idle.values()):
        return None

    def estimate(draw: Draw) -> NDArray[np.float64]:
        per_request_s = fit_entry([samples[label] for label in draw(together)]).per_request_s
        per_output_token_s = _token_work_s([samples[label] for label in draw(list(samples))])
        per_prompt_token_s = _prompt_token_cpu_s(draw(points))
        waits = np.concatenate([idle[label] for label in draw(list(idle))])
        work_s = per_request_s + per_prompt_token_s * waits[:, 1] + per_output_token_s
        delay_s = max(0.0, float(np.median(waits[:, 0] - work_s)))
        return np.array([delay_s, per_request_s, per_prompt_token_s, per_output_token_s])

    values = estimate(Draw(None))
    drawn = [estimate(Draw(stream(0, "front end", number))) for number in range(RESAMPLES)]
    low, high = np.quantile([values, *drawn], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return FrontEndCosts(
        **{
            name: Parameter(value=_digits(value), low=_digits(min(least, value)), high=_digits(max(most, value)))
            for name, value, least, most in zip(FrontEndCosts.model_fields, values, low, high, strict=True)
        }
    )


class Draw:
    """Gives items as they are, or as many drawn with replacement."""

    def __init__(self, rng: np.random.Generator | None):
        self._rng = rng

    def __call__(self, items: Sequence[T]) -> list[T]:
        """Return the items or a draw of them."""
        if self._rng is None:
            return list(items)
        return [items[index] for index in self._rng.integers(len(items), size=len(items))]


def _idle_waits(sample: EntrySample, iterations: pd.DataFrame, fitted: TermFit) -> NDArray[np.float64]:
    """Return what each idle request waited beyond its iterations, and its prompt tokens; shape (requests, 2)."""
    records = iterations[iterations["point"] == sample.sent[0].point]
    works = records[[*IterationWork._fields]].to_numpy(dtype=np.float64)
    found = []
    for request, number in zip(sample.sent, sample.admitted, strict=True):
        if number is None:
            continue
        last = bisect_right([line.ended_s for line in sample.lines], request.first_token_s) - 1
        engine_s = float(fitted.predict_s(works[number : max(last, number) + 1]).sum())
        found.append((request.first_token_s - request.sent_s - engine_s, float(request.prompt_tokens)))
    return np.array(found, np.float64).reshape(-1, 2)


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
    weight: NDArray[np.float64] = np.sqrt(frame["size"].to_numpy(dtype=np.float64)) / (counts + 4)
    rows = np.column_stack([np.ones(len(counts)), counts]) * weight[:, None]
    values, _ = nnls(rows, frame["median"].to_numpy() * weight)
    return float(values[1])


def _prompt_token_cpu_s(points: Sequence[MeasuredPoint]) -> float:
    """Return CPU seconds of the API server a prompt token; 0 where they were not measured."""
    told = [point for point in points if point.front_end_cpu_s is not None]
    if len(told) < FEWEST_POINTS:
        return 0.0
    counts = np.array([[p.requests, p.prompt_tokens, p.output_tokens, p.iterations] for p in told], dtype=np.float64)
    spent_s = np.array([p.front_end_cpu_s for p in told], dtype=np.float64)
    weight = 1 / np.maximum(spent_s, 1e-3)  # relative, or the largest points would decide alone
    rows = counts * weight[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    costs = nnls(rows / scale, spent_s * weight)[0] / scale
    return float(costs[1])


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
