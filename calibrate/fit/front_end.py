"""What a request waits in the front end, from what its measured TTFT holds beyond iterations."""

from collections.abc import Sequence
from math import isnan

import numpy as np

from calibrate.fit.observations import Observation, cold_share, tail_tokens, with_chunk
from calibrate.fit.parameters import CONFIDENCE, Estimate
from sim.roofline import Roofline, default_front_end
from sim.streams import stream


def front_end_delay_s(
    observations: Sequence[Observation], curves: Sequence[Roofline], *, resamples: int
) -> Estimate | None:
    """Return the delay of a request, the median over runs of what is left of their mean TTFT; None without a TTFT.

    The interval is of medians over resampled experiments, whole ones at a time; it holds what the runs differ by, the
    error of their predicted iterations included.

    Args:
        observations: of one group of engines.
        curves: of the engine of each.
        resamples: 0: no interval, it is the value.
    """
    left_s: dict[str, list[float]] = {}
    for seen, curve in zip(observations, curves, strict=True):
        if not isnan(seen.run.ttft_mean_s):
            left_s.setdefault(seen.run.exp, []).append(_left_s(seen, curve))
    if not left_s:
        return None
    by_experiment = [left_s[name] for name in sorted(left_s)]
    value = _median_s(by_experiment)
    medians = [value]
    for number in range(resamples):
        drawn = stream(0, "front end", number).integers(len(by_experiment), size=len(by_experiment))
        medians.append(_median_s([by_experiment[index] for index in drawn]))
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def _median_s(by_experiment: Sequence[Sequence[float]]) -> float:
    return max(0.0, float(np.median(np.concatenate(by_experiment))))


def _left_s(seen: Observation, curve: Roofline) -> float:
    """Return the mean TTFT of a run without its iterations and the front end's own work.

    With asynchronous scheduling the next iteration is already scheduled when a request arrives: it waits for half of
    the one in flight on average and all of the next, then takes its own; synchronously it does not wait for the next.
    """
    run, costs = seen.run, default_front_end()
    batch, kv_tokens = max(1, round(seen.decodes)), round(seen.kv_tokens)
    cold = cold_share(run)
    own_s = (1 - cold) * curve.iteration_s(with_chunk(tail_tokens(), run.prompt_tokens_mean, batch, kv_tokens))
    own_s += cold * curve.iteration_s(with_chunk(run.prompt_tokens_mean, run.prompt_tokens_mean, batch, kv_tokens))
    waits = 1.5 if seen.group.async_scheduling else 0.5
    front_end_s = costs.per_request_s + costs.per_prompt_token_s * run.prompt_tokens_mean
    front_end_s += costs.per_output_token_s * seen.decodes  # the tokens of its iteration
    return run.ttft_mean_s - waits * seen.measured_s - own_s - front_end_s
