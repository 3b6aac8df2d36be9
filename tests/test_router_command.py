"""``expert-router router`` as its users meet it."""

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from real.router.router_file import read_router_file
from sim.cli import main
from tests.classifiers import labels, packaged_prompts


def router(*arguments: str, exit_code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(main, ["router", *arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every third prompt of the corpus, in a file."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = zip(packaged_prompts().texts[::3], labels()[::3], strict=True)
    path.write_text("\n".join(json.dumps({"text": text, "class": label}) for text, label in rows))
    return str(path)


def test_fit_writes_a_classifier_that_the_others_take(prompts: str, tmp_path: Path) -> None:
    out = str(tmp_path / "mine.npz")
    result = router("fit", prompts, "--classes", "4", "--out", out, "--seed", "3")
    assert f"wrote {out} (" in result.stderr
    assert "170 prompts" in result.stdout
    assert re.search(r"right by the labels: [\d.]+% of these, of prompts held out [\d.]+%", result.stdout)
    assert re.search(r"^ +8,000 +\d+\.\d+ +\d+\.\d+", result.stdout, re.MULTILINE)
    assert "labels without a class of their own count as wrong: " in result.stdout
    assert "--centres labels makes each label a class" in result.stdout
    names = read_router_file(Path(out)).centres.class_names
    assert len(names) == 4
    explained = router("explain", packaged_prompts().texts[0], "--classifier", out).stdout
    assert re.search(rf"^({'|'.join(names)}) rather than ({'|'.join(names)}), by a margin of", explained, re.MULTILINE)
    evaluated = router("evaluate", prompts, "--classifier", out).stdout
    assert "labels that are not classes of this classifier: " in evaluated


def test_the_same_seed_writes_the_same_file(prompts: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    for out in (first, second):
        router("fit", prompts, "--centres", "labels", "--out", str(out))
    assert first.read_bytes() == second.read_bytes()


def test_explain_shows_distances_and_the_terms_that_decide() -> None:
    result = router("explain", "-", "--terms", "2", stdin="Please translate this German sentence into French: [/]")
    assert re.search(r"^  translation +0\.\d{4} *$", result.stdout, re.MULTILINE)
    assert "translation rather than" in result.stdout
    assert re.search(r"^  (translate|german|french) +1 +\+0\.", result.stdout, re.MULTILINE)
    assert re.search(r"^  \(\d more\)", result.stdout, re.MULTILINE)


def test_evaluate_ends_with_lines_of_a_fleet_file() -> None:
    result = router("evaluate")
    assert "right by the labels: " in result.stdout
    lines = yaml.safe_load(result.stdout.split("itself takes):\n")[1])
    assert 0 < lines["per_prompt_token_s"] < 1e-3
    assert sum(sum(row.values()) for row in lines["confusion"].values()) == len(packaged_prompts().texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "none.jsonl"), "none.jsonl: cannot be read: No such file or directory\n"),
        (("explain", "hello", "--classifier", "none.npz"), "none.npz: cannot be read: No such file or directory\n"),
        (("fit", "none.jsonl", "--model", "x"), "--model is of --kind embedding only"),
        (("fit", "none.jsonl", "--classes", "0"), "0 is not in the range x>=1"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert message in router(*arguments, exit_code=2).stderr


def test_a_wrong_line_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    assert router("fit", str(path), exit_code=2).stderr == (
        f"{path}, line 2: text must be text that is not empty, got 1\n"
    )


def test_a_folder_that_does_not_exist_is_told(prompts: str) -> None:
    result = router("fit", prompts, "--centres", "labels", "--out", "/nowhere/router.npz", exit_code=2)
    assert result.stderr.startswith("/nowhere/router.npz: cannot be written: No such file")


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("sklearn", "k_means_constrained"):
            raise ImportError(f"No module named {name!r}", name=name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    result = router("fit", prompts, exit_code=2)
    assert result.stderr == "fitting needs k_means_constrained: pip install 'expert-router[router]'\n"
    router("explain", "hello")  # serving needs none of it
