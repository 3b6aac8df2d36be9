"""Tables of runs as files, for tests of what reads and replays them."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from calibrate.predictor import PredictedEngine
from calibrate.tables.measured_runs import MeasuredRun
from sim.fleet import FrontEnd
from tests.fleets import AffineCurve

GROUND_TRUTH = Path(
    os.environ.get("EXPERT_ROUTER_GROUND_TRUTH") or Path(__file__).parents[2] / "shared" / "ground_truth"
)

ROW = {
    "run_id": "ours/a/s0",
    "exp": "ours/a",
    "stage": "0",
    "engine": "vLLM",
    "engine_version": "0.15.1",
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "quantization": "none",
    "gpu": "H100-SXM-80GB",
    "tp": "1",
    "load_type": "open_loop",
    "max_num_seqs": "128",
    "max_num_batched_tokens": "2048",
    "max_model_len": "4096.0",
    "prefix_caching": "True",
    "kv_blocks": "20001",
    "block_size": "16",
    "rate_rps": "5.0",
    "n_requests": "400",
    "in_len_mean": "600",
    "in_len_std": "8",
    "out_len_mean": "100",
    "out_len_std": "0",
    "e2e_mean": "1.5",
    "colour": "unknown columns are passed over",
}


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows with the columns of the first one; return the path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def run_of(**fields: object) -> MeasuredRun:
    """Return an open-loop run of a small engine with these fields changed."""
    values: dict[str, object] = {
        "run_id": "ours/a/s0",
        "exp": "ours/a",
        "stage": 0,
        "engine": "vLLM",
        "engine_version": "0.15.1",
        "model": "llama-3.1-8b",
        "quantization": "none",
        "gpu": "H100",
        "tp": 1,
        "load_type": "open_loop",
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "max_model_len": 4096,
        "kv_blocks": 20_001,
        "block_size": 16,
        "rate_rps": 5.0,
        "n_requests": 400,
        "prompt_tokens_mean": 600.0,
        "prompt_tokens_std": 8.0,
        "output_tokens_mean": 100.0,
        "output_tokens_std": 0.0,
    }
    return MeasuredRun(**(values | fields))  # type: ignore[arg-type]


def engine_of(curve: AffineCurve, *, per_request_s: float = 0.0) -> PredictedEngine:
    """Return an engine with this curve and a front end that costs next to nothing."""
    front_end = FrontEnd(per_request_s=per_request_s, per_prompt_token_s=0.0, per_output_token_s=0.0)
    return PredictedEngine(curve=curve, front_end=front_end, async_scheduling=True, label="affine")
