"""One run as the result JSON of ``vllm bench serve --save-detailed`` (vLLM 0.33), for tools that read that format."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.fleet import Fleet
from sim.metrics import (
    LATENCIES,
    Floats,
    completed_in_window,
    distribution,
    e2el_s,
    failed_in_window,
    meets_slo,
    tpot_s,
    ttft_s,
    weighted_distribution,
)
from sim.records import RunRecord
from sim.result import Measured
from sim.spec import FleetFile, OpenLoop


def vllm_result(run: RunRecord, fleet: Fleet, file: FleetFile, measured: Measured | None = None) -> dict[str, Any]:
    """Return vLLM's keys for the requests that ended in the measured window; NaN and ``None`` where unknown.

    What a simulation does not have is left out or null rather than made up: ``date`` (equal inputs give equal files),
    ``generated_texts``, and ``itls`` and ``max_output_tokens_per_s``, because gaps are kept pooled over requests, not
    per request (the ``itl`` figures are exact). Where vLLM reports 0 for a figure without data, this says null.
    ``queue_times``, the wait inside the load generator, is 0 because users send at once. Keys that vLLM does
    not have follow at the end, as its ``--metadata`` would add them.
    """
    load = file.workload.load
    completed = completed_in_window(run)
    ended = completed | failed_in_window(run)
    done = {name: column[completed] for name, column in run.requests.items()}
    detailed = {name: column[ended] for name, column in run.requests.items()}
    duration_s = run.window_s[1] - run.window_s[0]
    input_tokens, output_tokens = int(done["prompt_tokens"].sum()), int(done["output_tokens"].sum())
    rate = 1 / duration_s if duration_s > 0 else np.nan
    ttft, tpot, e2el = ttft_s(done), tpot_s(done), e2el_s(done)
    models = sorted({expert.model for expert in fleet.experts})
    succeeded = completed[ended]
    return {
        "backend": "expert-router simulate" if measured is None else "expert-router run",
        "label": run.fleet,
        "model_id": ", ".join(models),
        "tokenizer_id": ", ".join(models),
        "num_prompts": int(ended.sum()),
        "request_rate": {"closed_loop": "inf", "open_loop": run.load}.get(run.load_kind),
        "burstiness": load.burstiness if isinstance(load, OpenLoop) else 1.0,
        "max_concurrency": int(run.load) if run.load_kind == "closed_loop" else None,
        "duration": duration_s,
        "completed": int(completed.sum()),
        "failed": int(ended.sum()) - int(completed.sum()),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(ttft) * rate,
        "request_goodput": None if file.slo is None else int(meets_slo(ttft, tpot, e2el, file.slo).sum()) * rate,
        "output_throughput": output_tokens * rate,
        "total_token_throughput": (input_tokens + output_tokens) * rate,
        "max_output_tokens_per_s": None,
        "max_concurrent_requests": _max_concurrent_requests(done["sent_s"], done["last_token_s"]),
        **_spreads(run, {"ttft": ttft, "tpot": tpot, "e2el": e2el}),
        "input_lens": detailed["prompt_tokens"].tolist(),
        "output_lens": np.where(succeeded, detailed["output_tokens"], 0).tolist(),
        "ttfts": np.where(succeeded, ttft_s(detailed), np.nan).tolist(),
        "latencies": np.where(succeeded, e2el_s(detailed), np.nan).tolist(),
        "start_times": detailed["sent_s"].tolist(),
        "queue_times": [0.0] * len(succeeded),
        "errors": ["" if success else "failed" for success in succeeded],
        "simulated": measured is None,
        "seed": file.run.seed,
        "replication": run.replication,
        **(
            {"service_curves": {expert.name: expert.curve.source.label for expert in fleet.experts}}
            if measured is None
            else {"measured": measured.started, "url": measured.urls[run.fleet], "engines": measured.engines[run.fleet]}
        ),
    }


def _spreads(run: RunRecord, per_request_s: dict[str, Floats]) -> dict[str, float]:
    spreads = {name: distribution(values) for name, values in per_request_s.items()}
    spreads["itl"] = weighted_distribution(run.gaps.gap_s, run.gaps.weight)
    return {
        f"{statistic}_{name}_ms": getattr(spreads[name], statistic) * 1e3
        for name in LATENCIES
        for statistic in ("mean", "median", "std", "p90", "p99")
    }


def _max_concurrent_requests(start_s: NDArray[Any], end_s: NDArray[Any]) -> int | None:
    """Most requests that touch one and the same second of the run, which is how vLLM counts them."""
    if len(start_s) == 0:
        return None
    origin_s = start_s.min()
    first = (start_s - origin_s).astype(np.int64)
    after = (end_s - origin_s).astype(np.int64) + 1
    changes = np.zeros(after.max() + 1, dtype=np.int64)
    np.add.at(changes, first, 1)
    np.subtract.at(changes, after, 1)
    return int(changes.cumsum().max())
