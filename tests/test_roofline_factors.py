import json
import os
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calibrate.fit.kernel_factors import all_reduce_factors, gemm_factors
from calibrate.fit.roofline_factors import all_factors, comparison, steady_runs, summary
from sim.factors import GemmFactors, packaged_factors

GROUND_TRUTH = Path(
    os.environ.get("EXPERT_ROUTER_GROUND_TRUTH") or Path(__file__).parents[2] / "shared" / "ground_truth"
)
needs_ground_truth = pytest.mark.skipif(
    not (GROUND_TRUTH / "op_times.csv.gz").is_file(),
    reason=f"no {GROUND_TRUTH}; set EXPERT_ROUTER_GROUND_TRUTH to the folder with op_times.csv.gz",
)


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(GROUND_TRUTH / name, low_memory=False)


def test_gemm_fit_recovers_the_factors_that_made_the_times() -> None:
    truth = GemmFactors(fixed_s=4e-6, bandwidth_efficiency=0.8, rate_efficiency=0.7, overlap_exponent=3.0)
    rows = []
    for tokens in (1, 8, 64, 128, 256, 512, 2048, 8192):
        for outputs, inputs in ((4096, 4096), (14336, 4096), (8192, 8192), (4096, 14336), (10240, 8192)):
            moved_bytes = 2 * (outputs * inputs + tokens * (outputs + inputs))
            seconds = truth.gemm_s(moved_bytes / 3350e9, 2 * tokens * outputs * inputs / 989.4e12)
            rows.append(("gemm", "H100-SXM-80GB", "bfloat16", tokens, outputs, inputs, seconds * 1e6))
    ops = pd.DataFrame(rows, columns=["op", "gpu", "dtype", "m_tokens", "n", "k", "time_us"])
    fitted = {factor.name.removeprefix("hopper.gemm_bf16."): factor.value for factor in gemm_factors(ops)}
    assert fitted == pytest.approx(
        {"fixed_s": 4e-6, "bandwidth_efficiency": 0.8, "rate_efficiency": 0.7, "overlap_exponent": 3.0}, rel=1e-3
    )


def test_all_reduce_fit_recovers_fixed_time_and_link_share() -> None:
    message_bytes = 2.0 ** np.arange(7, 24)
    ops = pd.DataFrame(
        {
            "op": "all_reduce",
            "gpu": "A100-SXM-80GB",
            "kernel": "vLLM_custom_graph",
            "source": "made up",
            "tp": 4.0,
            "bytes": message_bytes,
            "time_us": 5.0 + 1.5 * message_bytes / (300e9 * 0.4) * 1e6,
        }
    )
    fitted = {factor.name: factor.value for factor in all_reduce_factors(ops)}
    assert fitted["ampere.all_reduce_tp4.fixed_s"] == pytest.approx(5e-6, rel=1e-3)
    assert fitted["ampere.all_reduce_tp4.link_efficiency"] == pytest.approx(0.4, rel=1e-3)


def test_every_packaged_factor_tells_how_it_was_set_and_no_efficiency_exceeds_one() -> None:
    text = resources.files("sim").joinpath("data", "roofline.json").read_text(encoding="utf-8")
    for name, entry in json.loads(text)["factors"].items():
        assert entry["how"], name
        assert entry["value"] >= 0, name
        assert not name.endswith("efficiency") or entry["value"] <= 1, name


@needs_ground_truth
def test_packaged_factors_are_what_the_command_makes() -> None:
    made = all_factors(read("op_times.csv.gz"), read("serving_runs.csv"), read("splitwise_prompt_token_times.csv"))
    text = resources.files("sim").joinpath("data", "roofline.json").read_text(encoding="utf-8")
    packaged = {name: entry["value"] for name, entry in json.loads(text)["factors"].items()}
    assert {factor.name: factor.value for factor in made} == pytest.approx(packaged, rel=0.01, abs=1e-9)


@needs_ground_truth
def test_roofline_meets_the_measured_time_per_output_token_of_steady_runs() -> None:
    table = comparison(steady_runs(read("serving_runs.csv")), packaged_factors())
    errors = summary(table)
    print(errors.to_string(float_format="%.1f"))
    absolute_percent = table["error_percent"].abs().to_numpy(float)
    assert len(absolute_percent) >= 40
    assert np.median(absolute_percent) < 5
    assert np.max(absolute_percent) < 15
