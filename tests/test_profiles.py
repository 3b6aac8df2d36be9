import re
from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from calibrate.fit.experts import ExpertKey, expert_key, llama_family, why_impossible
from calibrate.fit.fit import Calibration, fit
from calibrate.fit.held_out import HeldOutErrors, find_held_out_errors
from calibrate.fit.parameters import ASYNCHRONOUS, CORRECTIONS, OVERHEADS, SYNCHRONOUS
from calibrate.fit.profiles import make_profile, provenance_of, write_profiles
from calibrate.tables.measured_runs import MeasuredRun
from sim.catalogue import UnknownNameError
from sim.profile import ASSUMED_ERROR_GROWTH, Profile, RooflineParameters, load_profile
from sim.resolve import packaged_profiles, profile_name, resolve_expert
from sim.service_curve import IterationWork
from sim.spec import ExpertSpec
from tests.synthetic_runs import by_linear_model, loads, with_noise

MEASURED: ExpertKey = ("llama-3.1-8b", "bf16", "H100-SXM", 1)


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    engines = [
        ("llama-3.1-8b", "H100-SXM", 1),
        ("qwen3-14b", "H100-SXM", 1),
        ("codellama-34b", "H100-SXM", 2),
        ("codellama-34b", "A100-80GB", 4),
        ("llama-2-7b", "A100-80GB", 1),
    ]
    return with_noise([by_linear_model(load) for load in loads(engines)], 0.02, np.random.default_rng(1))


@pytest.fixture(scope="module")
def calibration(runs: list[MeasuredRun]) -> Calibration:
    return fit(runs)


@pytest.fixture(scope="module")
def held_out(runs: list[MeasuredRun]) -> HeldOutErrors:
    return find_held_out_errors(runs, ASYNCHRONOUS)


def profile_of(calibration: Calibration, held_out: HeldOutErrors, key: ExpertKey = MEASURED) -> Profile:
    return make_profile(
        calibration,
        ASYNCHRONOUS,
        key,
        engine="vllm-0.15",
        engine_version="vLLM 0.15.1",
        held_out=held_out,
        provenance=provenance_of(calibration),
    )


def test_a_profile_survives_its_file(calibration: Calibration, held_out: HeldOutErrors, tmp_path: Path) -> None:
    profile = profile_of(calibration, held_out)
    (path,) = write_profiles([profile], tmp_path / "new" / "folder")
    assert path.name == "llama-3.1-8b-bf16-h100-sxm-tp1-vllm-0.15.json"
    assert path.stem == profile.name == profile_name(*MEASURED, "vllm-0.15")
    assert load_profile(path) == profile
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_resolved_profile_predicts_what_the_fit_does(
    calibration: Calibration, held_out: HeldOutErrors, runs: list[MeasuredRun], tmp_path: Path
) -> None:
    (path,) = write_profiles([profile_of(calibration, held_out)], tmp_path)
    expert = resolve_expert("chat", ExpertSpec(model=MEASURED[0], gpu=MEASURED[2], profile=str(path)))
    by_fit = calibration.engine_of(replace(runs[0], max_num_seqs=None, max_num_batched_tokens=None))
    for work in (IterationWork(0, 0, 0.0, 0, 64, 50_000), IterationWork(512, 1, 131_328.0, 512, 8, 4000)):
        assert expert.curve.iteration_s(work) == pytest.approx(by_fit.curve.iteration_s(work), rel=1e-3)
    assert expert.front_end.per_request_s == pytest.approx(by_fit.front_end.per_request_s, rel=1e-3)


def test_intervals_are_ordered_and_of_four_digits(calibration: Calibration, held_out: HeldOutErrors) -> None:
    parameters = profile_of(calibration, held_out).parameters
    assert isinstance(parameters, RooflineParameters)
    estimates = {**calibration.corrections, **calibration.overheads[ASYNCHRONOUS]}
    assert set(estimates) == {*CORRECTIONS, *OVERHEADS}
    for name, estimate in estimates.items():
        rounded = getattr(parameters, name)
        assert rounded.low is not None
        assert rounded.high is not None
        assert 0 <= rounded.low <= rounded.value <= rounded.high
        assert rounded.value == float(f"{estimate.value:.4g}")
        assert (rounded.low, rounded.high) == pytest.approx((estimate.low, estimate.high), rel=1e-3)


def test_every_figure_of_a_profile_has_an_interval_or_says_that_it_was_assumed(
    calibration: Calibration, held_out: HeldOutErrors
) -> None:
    profile = profile_of(calibration, held_out)
    assert profile.front_end is not None
    assert profile.front_end.per_request_engine_s is None, "a GPU's engine shares no cores with it"
    parameters = [
        getattr(group, name)
        for group in (profile.parameters, profile.front_end)
        for name in type(group).model_fields
        if name not in ("kind", "per_request_engine_s")
    ]
    assert len(parameters) == len(CORRECTIONS) + len(OVERHEADS) + 4
    for parameter in parameters:
        assert (parameter.low is None) == (parameter.high is None) == (parameter.assumed is not None)
    assert "memory model" in profile.assumptions["num_gpu_blocks"]
    assert "captures" in profile.assumptions["cuda_graph_padding"]


def test_the_front_end_delay_has_the_interval_of_the_runs_ttft(runs: list[MeasuredRun]) -> None:
    delays_s = np.random.default_rng(2).normal(0.006, 0.0005, len(runs))
    plain = fit([replace(run, ttft_mean_s=1.0) for run in runs], resamples=0)
    left_s = plain.delays_s[ASYNCHRONOUS].value
    assert left_s < 1
    measured = [replace(run, ttft_mean_s=1.0 - left_s + delay) for run, delay in zip(runs, delays_s, strict=True)]
    found = fit(measured).delays_s[ASYNCHRONOUS]
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.02
    assert ASYNCHRONOUS not in fit(runs, resamples=0).delays_s


@pytest.mark.parametrize(
    ("key", "what", "gpus", "stages"),
    [
        (MEASURED, None, ["H100-SXM"], 9),
        (("llama-3.1-8b", "bf16", "H100-SXM", 2), "experiments", ["H100-SXM"], 9),
        (("llama-2-7b", "bf16", "H100-SXM", 1), "experiments", ["H100-SXM"], 9),
        (("yi-34b", "bf16", "A100-80GB", 1), "models", ["A100-80GB"], 6),
        (("yi-34b", "bf16", "H200", 1), "GPUs", ["A100-80GB", "H100-SXM"], 15),
    ],
)
def test_errors_are_of_predictions_as_far_from_a_measurement(
    calibration: Calibration,
    held_out: HeldOutErrors,
    key: ExpertKey,
    what: str | None,
    gpus: list[str],
    stages: int,
) -> None:
    profile = profile_of(calibration, held_out, key)
    assert profile.residuals.held_out
    assert profile.residuals.gpus == gpus
    assert profile.residuals.measurements == stages
    told = re.search(r"the errors are of (\w+) that the fit had not seen", profile.provenance)
    assert (told and told[1]) == what
    assert ("was never measured: predicted from its shape" in profile.provenance) == (what is not None)
    assert ("no engine was measured on H200, only measured kernels tell of it" in profile.provenance) == (
        key[2] == "H200"
    )


def test_a_profile_says_how_its_error_grows_beyond_the_range(calibration: Calibration, held_out: HeldOutErrors) -> None:
    fitted = profile_of(calibration, held_out).range
    assert fitted.error_growth_per_doubling == round(held_out.growth, 2)
    unknown = replace(held_out, growth=nan)
    assert profile_of(calibration, unknown).range.error_growth_per_doubling == ASSUMED_ERROR_GROWTH


def test_what_stands_in_for_kernels_is_told(calibration: Calibration, held_out: HeldOutErrors) -> None:
    fp8 = profile_of(calibration, held_out, ("llama-3.1-8b", "fp8", "H100-SXM", 1))
    assert "predicted from its shape, fp8 from its kernels alone" in fp8.provenance
    blackwell = profile_of(calibration, held_out, ("llama-3.1-8b", "bf16", "B200", 1))
    assert "no engine was measured on B200, only the kernels of another GPU tell of it" in blackwell.provenance


def test_provenance_counts_what_the_fit_was_made_of(calibration: Calibration, runs: list[MeasuredRun]) -> None:
    text = "fitted to 15 load stages of 5 experiments ({}) by expert-router calibrate fit"
    assert provenance_of(calibration) == text.format("15 of made-up")
    named = [replace(run, source_repo="ours/bench") if run.gpu == "A100-80GB" else run for run in runs]
    assert provenance_of(fit(named, resamples=0)) == text.format("9 of made-up, 6 of ours/bench")
    many = [replace(run, source_repo=f"ours/{run.exp}") for run in runs]
    assert provenance_of(fit(many, resamples=0)).count("3 of") == 5
    assert "3 of others" in provenance_of(fit(many, resamples=0))


def test_one_experiment_alone_has_no_error(runs: list[MeasuredRun]) -> None:
    alone = runs[:3]
    with pytest.raises(ValueError, match="measure at least two"):
        profile_of(fit(alone), find_held_out_errors(alone, ASYNCHRONOUS))


def test_experts_of_a_single_gpu_have_the_errors_of_experiments(runs: list[MeasuredRun]) -> None:
    on_one = [run for run in runs if run.gpu == "H100-SXM"]
    profile = profile_of(fit(on_one), find_held_out_errors(on_one, ASYNCHRONOUS), ("yi-34b", "bf16", "H200", 1))
    assert "the errors are of experiments that the fit had not seen" in profile.provenance


def test_a_group_that_was_not_measured_has_no_profile(calibration: Calibration, runs: list[MeasuredRun]) -> None:
    found = find_held_out_errors(runs, SYNCHRONOUS)
    assert replace(found, growth=0.0) == HeldOutErrors(by_experiment=[], by_gpu=[], by_model=[], growth=0.0)
    assert isnan(found.growth)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("llama-3-8b/bf16/H100-SXM/1", ("llama-3-8b", "bf16", "H100-SXM", 1)),
        ("meta-llama/Llama-3.1-70B-Instruct/fp8/h200/2", ("llama-3.1-70b", "fp8", "H200", 2)),
    ],
)
def test_experts_are_named_by_any_names_of_the_catalogue(text: str, key: ExpertKey) -> None:
    assert expert_key(text) == key


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("llama-3-8b", "expected MODEL/QUANTIZATION/GPU/TP such as llama-3.1-8b/bf16/H100-SXM/1"),
        ("llama-3-8b/bf16/H100-SXM/two", "expected MODEL/QUANTIZATION/GPU/TP"),
        ("llama-3-8b/bf16/H100-SXM/0", "expected MODEL/QUANTIZATION/GPU/TP"),
        ("llama-3-8b/bf16/H100-SXM/3", "llama-3-8b cannot be split over 3 GPUs"),
        ("llama-3-70b/bf16/H100-SXM/1", "llama-3-70b in bf16 does not fit into H100-SXM x1"),
        ("llama-3-8b/int8/B200/1", "int8 does not run on B200"),
    ],
)
def test_an_expert_that_cannot_be_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"expert '{text}': ") + ".*" + re.escape(reason)):
        expert_key(text)


def test_an_unknown_gpu_says_which_are_near() -> None:
    with pytest.raises(UnknownNameError, match="unknown GPU 'H100-SMX', did you mean 'H100-SXM'"):
        expert_key("llama-3-8b/bf16/H100-SMX/1")


# ------------------------------------------------------------------------------------------------ packaged


def test_the_llama_family_is_packaged_and_every_profile_resolves() -> None:
    keys = llama_family(("bf16", "fp8"))
    assert all(why_impossible(key) is None for key in keys)
    assert packaged_profiles() == sorted(profile_name(*key, "vllm-0.15") for key in keys)
    assert {gpu for _, quantization, gpu, _ in keys if quantization == "fp8"} == {"H100-SXM", "H200", "L40S"}
    for model, quantization, gpu, size in keys:
        spec = ExpertSpec(
            model=model, quantization=quantization, gpu=gpu, tensor_parallel_size=size, profile="packaged"
        )
        source = resolve_expert("x", spec).curve.source
        assert source.label == profile_name(model, quantization, gpu, size, "vllm-0.15")
        assert source.detail.startswith("predicted without having seen ")


def test_fp8_is_wider_than_bf16_and_says_that_its_errors_are_of_an_older_engine() -> None:
    bf16, fp8 = (
        resolve_expert("x", ExpertSpec(model="llama-3.1-8b", quantization=name, gpu="H100-SXM", profile="packaged"))
        for name in ("bf16", "fp8")
    )
    assert fp8.curve.source.error_p90 > 2 * bf16.curve.source.error_p90
    assert "13 static batches of vLLM before 0.8 (V0 engine) on H100-SXM" in fp8.curve.source.detail
    assert (
        "static batches of llama-3-8b in fp8 on a V0 engine, by a fit that had seen no fp8" in fp8.curve.source.detail
    )


def test_a_packaged_profile_tells_where_its_errors_are_from() -> None:
    spec = ExpertSpec(model="llama-3-8b", gpu="H200", profile="packaged")
    detail = resolve_expert("x", spec).curve.source.detail
    assert "load stages of vLLM 0.15.1 on A100-80GB, H100-SXM, L40S, median error" in detail
    assert "llama-3-8b in bf16 on H200 x1 itself was never measured" in detail
