from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from calibrate.fit.fit import fit
from calibrate.fit.operators import operator_factors, read_operators
from calibrate.tables.measured_runs import read_measured_runs
from sim.cli import main
from sim.profile import load_profile
from sim.resolve import packaged_profiles, resolve_expert
from sim.service_curve import IterationWork
from sim.spec import ExpertSpec
from tests.measured_tables import GROUND_TRUTH, write_table
from tests.synthetic_runs import by_linear_model, loads, row_of, with_noise
from tests.test_operators import table as operators_table
from tests.test_static_batch import ROW as STATIC_ROW

ENGINES = [
    ("llama-3.1-8b", "H100-SXM", 1),
    ("qwen3-14b", "H100-SXM", 1),
    ("codellama-34b", "H100-SXM", 2),
    ("llama-2-7b", "A100-80GB", 1),
]
PACKAGED = Path(__file__).parents[1] / "sim" / "data" / "profiles"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = with_noise([by_linear_model(load) for load in loads(ENGINES)], 0.02, np.random.default_rng(1))
    rows = [row_of(run) for run in runs]
    rows[-1]["flag"] = "overloaded"
    return write_table(tmp_path_factory.mktemp("runs") / "runs.csv", rows)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["calibrate", "fit", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writes_a_profile_of_each_measured_expert_and_prints_what_it_knows(table: Path, tmp_path: Path) -> None:
    result = invoke(table, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(contents(tmp_path)) == [
        "codellama-34b-bf16-h100-sxm-tp2-vllm-0.15.json",
        "llama-2-7b-bf16-a100-80gb-tp1-vllm-0.15.json",
        "llama-3.1-8b-bf16-h100-sxm-tp1-vllm-0.15.json",
        "qwen3-14b-bf16-h100-sxm-tp1-vllm-0.15.json",
    ]
    for words in (
        "fitted to 11 load stages of 4 experiments",
        "vLLM 0.14 and later",
        "all_reduce",
        "errors of the time per output token",
        "A100-80GB",
        "1 rows not used:\n     1  flagged",
        "known worst of vLLM 0.14 and later",
        "in flight",
    ):
        assert words in result.stdout
    assert "wrote 4 profiles to" in result.stderr


def test_the_same_table_gives_the_same_bytes(table: Path, tmp_path: Path) -> None:
    first = invoke(table, "--out", tmp_path / "a")
    second = invoke(table, "--out", tmp_path / "b")
    assert first.stdout == second.stdout
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_writes_the_experts_asked_for(table: Path, tmp_path: Path) -> None:
    options = ["--expert", "meta-llama/Llama-3.1-70B-Instruct/fp8/H200/2", "--expert", "llama-3-8b/bf16/L40S/1"]
    named = ["--engine", "ours", "--engine-version", "vLLM 0.16.0, our build"]
    result = invoke(table, *options, *named, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(contents(tmp_path)) == ["llama-3-8b-bf16-l40s-tp1-ours.json", "llama-3.1-70b-fp8-h200-tp2-ours.json"]
    profile = load_profile(tmp_path / "llama-3-8b-bf16-l40s-tp1-ours.json")
    assert profile.expert.engine_version == "vLLM 0.16.0, our build"
    assert "was never measured" in profile.provenance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert", "lama-3-8b/bf16/H100-SXM/1"], "unknown model 'lama-3-8b', did you mean 'llama-3-8b'?"),
        (["--expert", "llama-3-8b/bf16/H100-SMX/1"], "unknown GPU 'H100-SMX', did you mean 'H100-SXM'?"),
        (["--expert", "llama-3-8b"], "expert 'llama-3-8b': expected MODEL/QUANTIZATION/GPU/TP such as"),
        (["--engine-version", "vLLM 0.9.0"], "no run of vLLM before 0.14"),
        (["--engine-version", "vLLM 0.6.0"], "no measured run is left to fit to; left out: {"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(table: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = invoke(table, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_static_batches_of_old_engines_make_profiles_of_old_engines_and_errors_of_quantizations(
    table: Path, tmp_path: Path
) -> None:
    models = ("llama-3-8b", "llama-2-7b", "llama-3.1-8b")
    batches = [
        STATIC_ROW | {"run_id": f"{model}/{weights}/{n}", "model": model, "weight_dtype": weights, "batch_size": n}
        for model in models
        for weights in ("fp16", "fp8")
        for n in (1, 16, 64)
    ]
    static = write_table(tmp_path / "static.csv", batches)
    options = ["--static-batch", static, "--expert", "llama-3-8b/fp8/H100-SXM/1"]
    for version, name in (("vLLM 0.15.1", "vllm-0.15"), ("vLLM 0.6.0", "vllm-0.6")):
        result = invoke(table, *options, "--engine-version", version, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    modern, old = (
        load_profile(tmp_path / name / f"llama-3-8b-fp8-h100-sxm-tp1-{name}.json") for name in ("vllm-0.15", "vllm-0.6")
    )
    assert modern.residuals.what == "static batches"
    assert modern.residuals.measurements == 9
    assert "static batches of llama-2-7b, llama-3-8b, llama-3.1-8b in fp8 on a V0 engine" in modern.provenance
    assert old.residuals.what == "load stages"
    assert modern.parameters != old.parameters
    without = invoke(table, "--expert", "llama-3-8b/fp8/H100-SXM/1", "--out", tmp_path / "without")
    assert without.exit_code == 0, without.output
    alone = load_profile(tmp_path / "without" / "llama-3-8b-fp8-h100-sxm-tp1-vllm-0.15.json")
    assert alone.parameters == modern.parameters


def test_operator_times_replace_the_packaged_efficiencies(table: Path, tmp_path: Path) -> None:
    operators = operators_table(tmp_path)
    options = ["--operators", operators, "--expert", "llama-3.1-8b/bf16/H100-SXM/1"]
    result = invoke(table, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").iterdir()
    profile = load_profile(path)
    assert profile.kernels["hopper.gemm_bf16.bandwidth_efficiency"] == pytest.approx(0.8, rel=1e-3)
    expert = resolve_expert("x", ExpertSpec(model="llama-3.1-8b", gpu="H100-SXM", profile=str(path)))
    calibration = fit(read_measured_runs(table), resamples=0, factors=operator_factors(read_operators(operators)))
    run = replace(read_measured_runs(table)[0], max_num_seqs=None, max_num_batched_tokens=None)
    work = IterationWork(0, 0, 0.0, 0, 64, 50_000)
    by_fit = calibration.engine_of(run).curve.iteration_s(work)
    assert expert.curve.iteration_s(work) == pytest.approx(by_fit, rel=1e-3)


@pytest.mark.parametrize("option", ["--static-batch", "--operators"])
def test_a_broken_second_table_names_file_line_and_column(table: Path, tmp_path: Path, option: str) -> None:
    path = write_table(tmp_path / "s.csv", [STATIC_ROW]) if option == "--static-batch" else operators_table(tmp_path)
    path.write_text(path.read_text(encoding="utf-8")[:-60], encoding="utf-8")
    result = invoke(table, option, path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{path}: line " in result.stderr
    assert ": column '" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_broken_table_names_the_line(table: Path, tmp_path: Path) -> None:
    lines = table.read_text(encoding="utf-8").splitlines()
    (tmp_path / "broken.csv").write_text("\n".join([*lines[:3], lines[3][:20]]), encoding="utf-8")
    result = invoke(tmp_path / "broken.csv", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "broken.csv: line 4" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_table_with_nothing_to_fit_says_why(table: Path, tmp_path: Path) -> None:
    run = by_linear_model(loads(ENGINES)[0])
    result = invoke(write_table(tmp_path / "one.csv", [row_of(run) | {"flag": "overloaded"}]), "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == "no measured run is left to fit to; left out: {'flagged': 1}\n"


@pytest.mark.skipif(not (GROUND_TRUTH / "serving_runs.csv").is_file(), reason="no table of measured runs here")
def test_the_packaged_profiles_are_what_the_command_in_their_readme_writes(tmp_path: Path) -> None:
    options = ["--static-batch", GROUND_TRUTH / "static_batch_runs.csv", "--llama-family"]
    options += ["--engine", "vllm-0.15", "--engine-version", "vLLM 0.15.1"]
    result = invoke(GROUND_TRUTH / "serving_runs.csv", *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    written = contents(tmp_path)
    assert sorted(written) == [f"{name}.json" for name in packaged_profiles()]
    for name, content in written.items():
        assert content == (PACKAGED / name).read_bytes(), name
