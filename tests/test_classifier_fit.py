"""Fitting: balanced, deterministic, named by the labels, and honest about what it is worth."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from real.router.classifier import fitted_classifier, read_packaged
from real.router.classifier_fit import RouterFit, confusion, cross_validate, top_terms
from real.router.classifier_report import fit_report, service_times
from tests.classifiers import clusters_of_half, fit_of_half, halves, labels, packaged_prompts

FRUIT = ["ripe apples and pears", "sweet apples", "pears on a tree", "a tree full of apples"]
CARS = ["the engine of a car", "fast cars and engines", "the car has wheels", "wheels, brakes and an engine"]


def test_clusters_are_of_equal_size_while_fitting() -> None:
    sizes = np.bincount(clusters_of_half().assigned_)
    assert len(sizes) == 4
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == len(halves()[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(10, 23), st.integers(0, 3))
def test_any_number_of_clusters_is_balanced(classes: int, prompts: int, seed: int) -> None:
    fit = RouterFit(classes=classes, seed=seed).fit(packaged_prompts().texts[:prompts])
    sizes = np.bincount(fit.assigned_, minlength=classes)
    assert sizes.max() - sizes.min() <= 1
    assert len(set(fit.centres_.class_names)) == classes


def test_the_same_seed_gives_the_same_classifier_and_another_seed_may_not() -> None:
    again = RouterFit(classes=4).fit(halves()[0])
    np.testing.assert_array_equal(again.centres_.vectors, clusters_of_half().centres_.vectors)
    assert again.centres_.class_names == clusters_of_half().centres_.class_names
    other = RouterFit(classes=4, seed=2).fit(halves()[0])
    assert not np.array_equal(other.centres_.vectors, again.centres_.vectors)


def test_clusters_take_the_names_of_the_labels_they_hold_most_of() -> None:
    fit = RouterFit(classes=2).fit(FRUIT + CARS, ["fruit"] * 4 + ["cars"] * 4)
    names = fit.centres_.class_names
    assert sorted(names) == ["cars", "fruit"]
    assert [names[row] for row in fit.assigned_] == ["fruit"] * 4 + ["cars"] * 4


def test_fewer_clusters_than_labels_take_as_many_names_and_more_take_terms() -> None:
    texts, given_labels = halves()[0], labels()[::2]
    assert set(RouterFit(classes=3).fit(texts, given_labels).centres_.class_names) < set(given_labels)
    names = RouterFit(classes=9).fit(texts, given_labels).centres_.class_names
    assert set(given_labels) < set(names)
    assert len(set(names)) == 9


def test_without_labels_names_are_top_terms() -> None:
    fit = RouterFit(classes=2).fit(FRUIT + CARS)
    named = dict(zip(fit.centres_.class_names, fit.top_terms_, strict=True))
    assert sorted(named) == ["apples-pears", "engine-car"] or all(
        name.split("-")[:2] == terms[:2] for name, terms in named.items()
    )


def test_centres_from_labels_are_their_means() -> None:
    fit = fit_of_half()
    rows = np.array([label == "maths" for label in labels()[::2]])
    maths = fit.centres_.class_names.index("maths")
    np.testing.assert_allclose(fit.centres_.vectors[maths], fit.points_[rows].mean(axis=0))


def test_top_terms_are_of_their_class() -> None:
    fruit, cars = top_terms(FRUIT + CARS, np.array([0] * 4 + [1] * 4), 2, most=2)
    assert fruit == ["apples", "pears"] or fruit == ["apples", "tree"]
    assert set(cars) <= {"engine", "car", "wheels"}


@pytest.mark.parametrize(
    ("fit", "given_labels", "message"),
    [
        (RouterFit(), None, "fitting without --classes needs prompts with the field class"),
        (RouterFit(classes=2, centres="labels"), None, "centres from labels needs prompts with the field class"),
        (RouterFit(classes=3, centres="labels"), ["a"] * 4 + ["b"] * 4, "one class a label, 2 here, not 3"),
        (RouterFit(classes=5), None, "8 prompts are too few for 5 classes, give at least 10"),
    ],
)
def test_what_cannot_be_fitted_is_told(fit: RouterFit, given_labels: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit.fit(FRUIT + CARS, given_labels)


def test_texts_without_words_are_told() -> None:
    with pytest.raises(ValueError, match="fewer than two words that tell them apart"):
        RouterFit(classes=2).fit(["?", "!", "the", "word"])


def test_texts_that_are_all_alike_can_be_fitted() -> None:
    fit = RouterFit(classes=2).fit(["purple elephants dance"] * 6)
    assert fit.classifier().classify("purple elephants") == fit.predict(["purple elephants"])[0]


# --------------------------------------------------------------------------------------------------------------- worth


def test_confusion_counts_labels_that_are_not_classes() -> None:
    found = confusion(["a", "a", "z"], ["a", "b", "b"], ["a", "b"])
    assert found.labels == ("a", "z")
    assert found.counts.tolist() == [[1, 1], [0, 1]]
    assert found.accuracy == pytest.approx(1 / 3)


def test_held_out_prompts_are_harder_than_fitted_ones_and_better_than_chance() -> None:
    report = fit_report(fit_of_half(), halves()[0], labels()[::2])
    assert 0.3 < report["held_out_accuracy"] < report["accuracy"] <= 1
    assert sum(sum(row.values()) for row in report["held_out"].values()) == len(halves()[0])
    assert report["agreement_with_scikit_learn"] >= 0.998
    assert sum(each["share"] for each in report["classes"].values()) == pytest.approx(1)
    assert -1 < report["silhouette"] < 1


def test_labels_without_meaning_are_held_out_at_chance() -> None:
    """The check that cross-validation leaks nothing: shuffled labels can be learned by heart, not predicted."""
    texts = halves()[0]
    shuffled = list(np.random.default_rng(1).permutation(labels()[::2]))
    fit = RouterFit(centres="labels").fit(texts, shuffled)
    held_out = cross_validate(fit, texts, shuffled)
    assert held_out is not None
    chance = max(Counter(shuffled).values()) / len(texts)
    assert abs(held_out.accuracy - chance) < 4 * np.sqrt(chance * (1 - chance) / len(texts))


def test_too_few_prompts_of_a_class_are_not_cross_validated() -> None:
    report = fit_report(RouterFit().fit(FRUIT + CARS, ["a"] * 4 + ["b"] * 4), FRUIT + CARS, ["a"] * 4 + ["b"] * 4)
    assert "held_out_accuracy" not in report


def test_service_times_are_of_texts_of_these_lengths() -> None:
    seen: list[int] = []

    def classify(text: str) -> int:
        seen.append(len(text.split()))
        return 0

    times = service_times(classify, ["one two three"], words=(7, 20), seconds=0.01)
    assert [each.words for each in times] == [7, 20]
    assert set(seen) == {7, 20}
    assert all(0 < each.p50_s <= each.p99_s for each in times)


# ---------------------------------------------------------------------------------------------- the packaged classifier


@pytest.fixture(scope="module")
def packaged_again() -> RouterFit:
    return RouterFit(centres="labels").fit(packaged_prompts().texts, labels())


def test_the_packaged_classifier_is_what_its_command_fits(packaged_again: RouterFit) -> None:
    packaged = fitted_classifier(read_packaged(), "packaged")
    assert packaged.class_names == packaged_again.centres_.class_names == tuple(sorted(set(labels())))
    expected = packaged_again.predict(packaged_prompts().texts)
    # Other processors round the SVD's sums otherwise, which can turn a prompt on a boundary.
    assert np.mean([packaged.classify(text) for text in packaged_prompts().texts] == expected) >= 0.99


def test_the_packaged_report_says_what_it_is_worth(packaged_again: RouterFit) -> None:
    report = read_packaged().report
    assert report["prompts"] == len(packaged_prompts().texts)
    expected = fit_report(packaged_again, packaged_prompts().texts, labels())
    assert report["held_out_accuracy"] == pytest.approx(expected["held_out_accuracy"], abs=0.02)
