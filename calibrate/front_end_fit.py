"""What a request and its tokens cost in an engine's front end, from its CPU seconds and from idle requests.

The front end is a process that works on requests one after another, so its work is CPU time: of the API server process
during each point, by non-negative least squares over requests, prompt tokens and output tokens. What an idle request
waits beyond its work and the engine's first iteration is a delay.
"""

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from calibrate.iteration_fit import TermFit
from calibrate.measurement_files import MeasuredPoint
from sim.profile import FrontEndCosts

FEWEST_POINTS = 4


def fit_front_end(
    points: list[MeasuredPoint], requests: pd.DataFrame, iterations: pd.DataFrame, fitted: TermFit
) -> FrontEndCosts | None:
    """Return the front end's costs; None when CPU times or idle requests were not measured."""
    told = [point for point in points if point.front_end_cpu_s is not None]
    if len(told) < FEWEST_POINTS:
        return None
    counts = np.array([[p.requests, p.prompt_tokens, p.output_tokens] for p in told], dtype=np.float64)
    spent_s = np.array([p.front_end_cpu_s for p in told], dtype=np.float64)
    # Relative to the point's size, or the largest points would decide alone.
    weight = 1 / np.maximum(spent_s, 1e-3)
    rows = counts * weight[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    costs, _ = nnls(rows / scale, spent_s * weight)
    per_request_s, per_prompt_token_s, per_output_token_s = (float(value) for value in costs / scale)
    waits_s = []
    starts = iterations[iterations["matched"] & (iterations["prefill_chunks"] > 0)]
    for label, sent in requests.groupby("point", sort=False):
        if not str(label).startswith("idle"):
            continue
        prefills = starts[starts["point"] == label]
        for request in sent.itertuples():
            mine = prefills[(prefills["ended_s"] > request.sent_s) & (prefills["ended_s"] < request.first_token_s + 1e-3)]
            if not len(mine):
                continue
            works = mine[
                [
                    "prefill_tokens",
                    "prefill_chunks",
                    "prefill_attention_pairs",
                    "prefill_kv_tokens",
                    "decodes",
                    "decode_kv_tokens",
                ]
            ].to_numpy(dtype=np.float64)
            work_s = per_request_s + per_prompt_token_s * request.prompt_tokens + per_output_token_s
            waits_s.append(request.first_token_s - request.sent_s - work_s - float(fitted.predict_s(works).sum()))
    if not waits_s:
        return None
    return FrontEndCosts(
        delay_s=_digits(max(0.0, float(np.median(waits_s)))),
        per_request_s=_digits(per_request_s),
        per_prompt_token_s=_digits(per_prompt_token_s),
        per_output_token_s=_digits(per_output_token_s),
    )


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
