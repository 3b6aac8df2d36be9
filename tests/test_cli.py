"""The command line as its users meet it: what it prints and writes, and one line about every mistake."""

import csv
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from real.processes.guarded_process import child_environment
from sim import load_fleet, simulate
from sim.cli import COMMANDS, main
from sim.feasibility import check_feasible
from sim.fleet_file import fleet_file_schema
from sim.outputs import FORMATS
from sim.spec import ClosedLoop

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
TINY = ("--users", "1,2", "--replications", "1")
LAPTOP = str(ROOT / "examples" / "laptop.yaml")

FILE = """\
workload:
  classes:
    chat: {prompt_tokens: 20, output_tokens: 5}
  load: {kind: closed_loop, users: [1, 3]}
fleets:
  one:
    experts:
      llama: {model: llama-3.1-8b, gpu: H100-SXM}
run: {requests: 10, replications: 1}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "fleet.yaml"
    path.write_text(FILE)
    return str(path)


def command(*arguments: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --------------------------------------------------------------------------------------------------------- results


def test_without_a_file_the_packaged_fleet_runs_and_says_how_to_go_on() -> None:
    result = command("simulate", *TINY)
    assert re.search(r"^ three experts +1 .*\n +2 ", result.stdout, re.MULTILINE)
    assert "roofline, not calibrated" in result.stdout
    assert "expert-router simulate my-fleet.yaml" in result.stderr
    assert "expert-router simulate" not in result.stdout


def test_with_a_file_nobody_says_how_to_go_on(file: str) -> None:
    result = command("simulate", file)
    assert result.stderr == ""
    assert "llama" in result.stdout


def test_json_is_strict_and_alone_on_stdout(file: str) -> None:
    result = command("simulate", file, "--json")
    figures = strict_json(result.stdout)
    assert {"name", "version", "seed", "interrupted", "notes", "fleets", "summary"} <= figures.keys()
    assert {(row["fleet"], row["users"], row["expert"]) for row in figures["summary"]} == {
        ("one", users, expert) for users in (1, 3) for expert in ("all", "llama")
    }
    assert result.stderr == ""


def test_json_without_a_file_is_json_alone() -> None:
    result = command("simulate", *TINY, "--json")
    assert strict_json(result.stdout)["name"] == "quickstart"
    assert result.stderr == ""


def test_what_python_returns_is_what_the_command_prints(file: str) -> None:
    printed = strict_json(command("simulate", file, "--json", "--users", "2", "--seed", "5").stdout)
    rows = simulate(load_fleet(file), users=[2], seed=5).summary_rows
    assert [row["mean_e2el_ms"] for row in printed["summary"]] == [row["mean_e2el_ms"] for row in rows]
    assert printed["seed"] == 5


def test_out_writes_tables_records_pictures_and_the_resolved_file(file: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = command("simulate", file, "--out", str(out))
    written = {path.name for path in out.iterdir()}
    assert {"summary.csv", "requests.parquet", "fleet.resolved.yaml", "ttft.png", "ttft.svg"} <= written
    assert f"wrote {len(written)} files to" in result.stderr
    with (out / "summary.csv").open() as table:
        assert [(row["users"], row["expert"]) for row in csv.DictReader(table)] == [
            (users, expert) for users in ("1", "3") for expert in ("all", "llama")
        ]
    assert pq.read_table(out / "requests.parquet").num_rows >= 20
    assert yaml.safe_load((out / "fleet.resolved.yaml").read_text())["workload"]["load"]["users"] == [1, 3]


def test_formats_write_only_themselves(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command("simulate", file, "--users", "2", "--out", str(out), "--format", "vllm", "--format", "csv")
    assert {path.name for path in out.iterdir()} == {"fleet.resolved.yaml", "summary.csv", "vllm"}
    (vllm,) = (out / "vllm").iterdir()
    assert strict_json(vllm.read_text())["completed"] == 10


def test_chrome_trace_writes_the_iterations_of_one_replica(file: str, tmp_path: Path) -> None:
    command("simulate", file, "--out", str(tmp_path), "--format", "csv", "--chrome-trace", "one/llama/0")
    slices = [event for event in strict_json((tmp_path / "trace.json").read_text())["traceEvents"] if "dur" in event]
    assert sum(event["args"]["prefill_tokens"] for event in slices) >= 10 * 20


def test_set_changes_a_value_of_the_file(file: str, tmp_path: Path) -> None:
    settings = ("--set", "fleets.one.experts.llama.gpu=L40S", "--set", "workload.classes.chat.output_tokens=7")
    figures = strict_json(command("simulate", file, "--json", *settings).stdout)
    assert figures["fleets"]["one"]["llama"]["gpu"] == "L40S"
    plain = strict_json(command("simulate", file, "--json").stdout)
    assert figures["summary"][0]["mean_e2el_ms"] > plain["summary"][0]["mean_e2el_ms"]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_equal_runs_print_equal_bytes(file: str, workers: str) -> None:
    assert (
        command("simulate", file, "--json", "--workers", workers).stdout == command("simulate", file, "--json").stdout
    )


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--users", "1,x"],
            "Error: Invalid value for '--users': expected whole numbers .* such as 1,10,100, got '1,x'",
        ),
        (["--users", "0"], "Error: Invalid value for '--users': numbers of users must be >= 1, got 0"),
        (["--users", ""], "Error: Invalid value for '--users': expected whole numbers .*, got ''"),
        (["--replications", "0"], "Error: Invalid value for '--replications': 0 is not in the range x>=1."),
        (["--seed", "-1"], "Error: Invalid value for '--seed': -1 is not in the range x>=0."),
        (["--workers", "0"], "Error: Invalid value for '--workers': 0 is not in the range x>=1."),
        (["--user", "1"], "Error: No such option '--user'.*'--users'.*"),
        (["--format", "vllm"], "Error: --format needs --out, the folder to write into"),
        (
            ["--format", "exe", "--out", "x"],
            f"Error: Invalid value for '--format': 'exe' is not one of .*{FORMATS[0]}.*",
        ),
        (["--chrome-trace", "one/llama/0"], "Error: --chrome-trace needs --out, the folder to write it into"),
        (
            ["--chrome-trace", "one/llama/1", "--out", "x"],
            "no replica 'one/llama/1'; expected FLEET/EXPERT/REPLICA, for example 'one/llama/0'",
        ),
        (["--set", "run.sede=1"], "run.sede: unknown field.*did you mean.*seed.*"),
        (["--set", "run"], ".*run.*PATH=VALUE.*"),
        (["--set", "run.seed=x"], "run.seed: .*got 'x' \\(--set\\)"),
        (["--set", "fleets.one.experts.llama.gpu=H100-SMX"], ".*unknown GPU 'H100-SMX'.*did you mean.*H100-SXM.*"),
        (["--set", "fleets.one.experts.llama.model=llama-3.1-70b"], ".*fleets.one.experts.llama.*GiB.*"),
        (["--set", "workload.load={kind: open_loop, rate_rps: 1}", "--users", "1"], "users apply to a closed_loop.*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_the_fix(file: str, arguments: list[str], line: str) -> None:
    result = command("simulate", file, *arguments, exit_code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    said = [text for text in result.stderr.splitlines() if text and not text.startswith(("Usage: ", "Try "))]
    assert len(said) == 1
    assert re.fullmatch(line, said[0]), said[0]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert command("simulate", str(missing), exit_code=2).stderr == f"{missing}: no such file\n"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (FILE.replace("requests: 10", "requests: ten"), "run.requests: .*'ten'.*line 9.*"),
        (
            FILE.replace("prompt_tokens", "promt_tokens"),
            "workload.classes.chat.promt_tokens: unknown field \\(line 3\\), did you mean 'prompt_tokens'\\?",
        ),
        ("workload: [", ".*line 1.*"),
        ("", "the fleet file is empty, expected at least 'workload' and 'fleets'"),
    ],
)
def test_a_wrong_file_is_told_line_by_line(file: str, wrong: str, line: str) -> None:
    Path(file).write_text(wrong)
    result = command("simulate", file, exit_code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert any(re.search(line, text) for text in result.stderr.splitlines()), result.stderr


def test_an_unknown_command_is_refused() -> None:
    assert "Error: No such command 'simulat'" in command("simulat", exit_code=2).stderr


# ---------------------------------------------------------------------------------------------------- schema, help


def test_schema_prints_the_schema_of_fleet_files() -> None:
    assert strict_json(command("schema").stdout) == fleet_file_schema()


def test_help_names_every_command() -> None:
    text = command("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^ +{name} +{line[:30]}", text, re.MULTILINE)


def test_version_is_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.run.version", {"expert-router": "1.2.3"}.__getitem__)
    assert command("--version").stdout == "expert-router 1.2.3\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_for_every_option(name: str) -> None:
    assert command(name, "--help").stdout.startswith("Usage: ")


@pytest.mark.parametrize(
    "statement", ["import sim.cli", "import sim.cli; sim.cli.main(['--help'], standalone_mode=False)"]
)
def test_help_imports_nothing_slow(statement: str) -> None:
    show = f"{statement}; import sys; print(*sys.modules, file=sys.stderr)"
    shown = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = set(shown.stderr.split())
    assert "sim.cli" in imported
    slow = {"joblib", "matplotlib", "numpy", "pandas", "pyarrow", "pydantic", "rich", "scipy", "simpy", "yaml"}
    assert not slow & imported


# ---------------------------------------------------------------------------------------------------- documentation


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_fleet_files_of_the_readme_run(tmp_path: Path) -> None:
    blocks = fenced("yaml")
    assert blocks
    for number, text in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        short = ("--set", "run.requests=5", "--replications", "1", "--users", "1,2")
        figures = strict_json(command("simulate", str(path), "--json", *short).stdout)
        assert {row["users"] for row in figures["summary"]} == {1, 2}


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = fenced("python")
    assert blocks
    monkeypatch.chdir(ROOT)
    for text in blocks:
        short = text.replace("users=[1, 100, 1000]", "users=[1, 2], replications=1")
        assert short != text
        (tmp_path / "snippet.py").write_text(short)
        frame = runpy.run_path(str(tmp_path / "snippet.py"))["result"].summary
        assert isinstance(frame, pd.DataFrame)
        assert set(frame["users"]) == {1, 2}
        for column in re.findall(r'"(\w+)"', text.splitlines()[-1]):
            assert column in frame.columns


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_can_be_simulated(path: Path) -> None:
    example = load_fleet(path)
    check_feasible(example)
    for name in re.findall(r"expert-router simulate (\S+\.yaml)", path.read_text()):
        assert (ROOT / name).is_file()
    if isinstance(example.workload.load, ClosedLoop):
        short = example.run.model_copy(update={"requests": 3, "requests_per_user": None, "replications": 1})
        result = simulate(example.model_copy(update={"run": short}), users=[1])
        assert len(result.runs) == len(example.fleets)


def test_the_commands_of_the_readme_name_files_that_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"(?:examples|docs|sim|tests)/[\w/.-]+\.\w+", text)
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    "words",
    [
        ("serve", LAPTOP),
        ("run", LAPTOP),
        ("check", LAPTOP),
        ("calibrate", "measure", LAPTOP),
        ("models", "make", "laptop-16m"),
    ],
)
def test_what_is_not_installed_is_told_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    code = "import sys; from sim.cli import OF_SERVE, main; sys.modules.update(dict.fromkeys(OF_SERVE)); main()"
    environment = child_environment({"EXPERT_ROUTER_HOME": str(tmp_path)})
    found = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert re.fullmatch(r"this needs \w+: pip install 'expert-router\[serve\]'; .*make install-cpu\n", found.stderr)
