"""Files of prompts, and the corpus that comes with the package."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from real.router.labelled_prompts import LabelledPrompts, read_prompts
from tests.classifiers import labels, packaged_prompts


def read(tmp_path: Path, text: str) -> LabelledPrompts:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


def test_prompts_with_and_without_classes(tmp_path: Path) -> None:
    assert read(tmp_path, '{"text": "a", "class": "x"}\n\n{"text": "b", "class": "y", "more": 1}\n') == LabelledPrompts(
        ("a", "b"), ("x", "y")
    )
    assert read(tmp_path, '{"text": "é\\u2028"}\n{"text": "b", "class": null}') == LabelledPrompts(
        ("é\u2028", "b"), None
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"prompts\.jsonl: holds no prompts"),
        ('{"text": "a"}\n{"text"', r"prompts\.jsonl, line 2: is not JSON: "),
        ('\n["a"]', r'line 2: expected an object such as \{"text": "\.\.\."\}, got a list'),
        ('{"prompt": "a"}', "line 1: text is missing"),
        ('{"text": 3}', "line 1: text must be text that is not empty, got 3"),
        ('{"text": " "}', "line 1: text must be text that is not empty, got ' '"),
        ('{"text": "a", "class": ""}', "line 1: class must be text that is not empty"),
        ('{"text": "a", "class": "x"}\n{"text": "b"}', "line 2: class is missing, though other lines have one"),
        ("[" * 100_000, "line 1: is not JSON: "),
    ],
)
def test_a_wrong_line_is_told_with_file_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"x\.jsonl: is not UTF-8 text: invalid start byte at byte 10"):
        read_prompts(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read: No such file"):
        read_prompts(tmp_path / "none.jsonl")


# -------------------------------------------------------------------------------------------------------- the corpus


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_the_corpus_has_enough_prompts_of_each_class() -> None:
    counts = Counter(labels())
    assert sorted(counts) == ["chat", "code", "maths", "science", "summary", "translation", "writing"]
    assert min(counts.values()) >= 70
    assert counts.total() >= 480


def test_the_corpus_is_of_all_lengths() -> None:
    lengths = sorted(len(text.split()) for text in packaged_prompts().texts)
    assert lengths[0] < 10 < lengths[len(lengths) // 2] < 50
    assert 300 < lengths[-5] <= lengths[-1] <= 400


def test_no_two_prompts_of_the_corpus_are_nearly_alike() -> None:
    """Pairs share few of their three-word sequences: no templates with their slots filled in."""
    shingles = [{*zip(text, text[1:], text[2:], strict=False)} for text in map(words, packaged_prompts().texts)]
    for (i, one), (j, other) in itertools.combinations(enumerate(shingles), 2):
        shared = len(one & other)
        if shared:
            assert shared / len(one | other) < 0.2, (packaged_prompts().texts[i], packaged_prompts().texts[j])


def test_prompts_of_a_class_begin_in_many_ways() -> None:
    for name in set(labels()):
        texts = [text for text, label in zip(packaged_prompts().texts, labels(), strict=True) if label == name]
        commonest = Counter(" ".join(words(text)[:2]) for text in texts).most_common(1)[0]
        assert commonest[1] <= len(texts) / 5, (name, commonest)


def test_the_corpus_names_no_address_and_no_secret() -> None:
    for text in packaged_prompts().texts:
        assert not re.search(r"https?://|\w@\w+\.\w|BEGIN [A-Z ]*KEY|sk-\w{8}", text)
