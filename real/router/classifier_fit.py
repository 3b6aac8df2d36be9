"""Fit the classifier as the paper and c-BTM do: features, then balanced k-means, one class per cluster.

Kept as in c-BTM: scikit-learn's tf-idf with English stop words left out and tokens that start with a digit made one
term, truncated SVD to 100 dimensions, normalisation; clusters of equal size while fitting, the nearest centre when
classifying.
Unlike there the term of numbers is not among the stop words: that a prompt holds numbers tells much about it.

The balance is k-means-constrained's: maintained, exact (minimum cost flow), deterministic, wheels for every platform;
balanced-kmeans, c-BTM's own, is a fork without releases that needs torch. It takes seconds for some thousand prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from real.router.centres import Centres
from real.router.embedding import PACKAGED, PROBE, Embedder
from real.router.router_file import RouterFile
from real.router.tfidf import TfidfClassifier, tokens

Kind = Literal["tfidf", "embedding"]
CentresFrom = Literal["kmeans", "labels"]
Progress = Callable[[float], None]

COMPONENTS = 100
FOLDS = 5
STARTS = 10
"""k-means is started this often from other points, and the tightest clusters are kept."""

Points = NDArray[np.floating]


def need_scikit_learn() -> None:
    """Check that what fitting needs is installed.

    Raises:
        ValueError: it is not; says how to install it.
    """
    try:
        import k_means_constrained  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"fitting needs {error.name}: pip install 'expert-router[router]'") from error


class TfidfFeatures:
    """The scikit-learn pipeline: tf-idf, SVD, normalisation."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, texts: Sequence[str]) -> Points:
        """Fit to these texts and return a row of length 1 for each.

        Raises:
            ValueError: the texts hold too few words.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer

        self.vectorizer_ = tfidf_vectorizer()
        try:
            counts = self.vectorizer_.fit_transform(texts)
        except ValueError:  # no words at all
            counts = np.empty((len(texts), 0))
        if counts.shape[1] < 2:
            raise ValueError("the prompts hold fewer than two words that tell them apart (English stop words do not)")
        components = max(1, min(COMPONENTS, counts.shape[0] - 1, counts.shape[1] - 1))
        self.svd_ = TruncatedSVD(components, random_state=self.seed)
        with np.errstate(invalid="ignore", divide="ignore"):  # the explained variance of texts that are all alike
            self.svd_.fit(counts)
        self.pipeline_ = make_pipeline(self.vectorizer_, self.svd_, Normalizer())
        return self.transform(texts)

    def transform(self, texts: Sequence[str]) -> Points:
        """Return a row for each text."""
        rows: Points = self.pipeline_.transform(texts)
        return rows

    def vocabulary(self) -> tuple[str, ...]:
        """Return the terms in the order of the table's rows."""
        return tuple(self.vectorizer_.get_feature_names_out())

    def table(self) -> Points:
        """Return idf times components, a row per term: the whole pipeline but for its lengths."""
        table: Points = self.vectorizer_.idf_[:, None] * self.svd_.components_.T
        return table


class EmbeddingFeatures:
    """Sentence embeddings; nothing of them is fitted, so each text is embedded once."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._seen: dict[str, Points] = {}

    def fit(self, texts: Sequence[str]) -> Points:
        """Return a row of length 1 for each text."""
        return self.transform(texts)

    def transform(self, texts: Sequence[str]) -> Points:
        """Return a row for each text."""
        new = list(dict.fromkeys(text for text in texts if text not in self._seen))
        if new:
            self._seen.update(zip(new, self.embedder(new), strict=True))
        return np.array([self._seen[text] for text in texts])


def tfidf_vectorizer() -> Any:
    """Return scikit-learn's vectorizer, with our tokens and without English stop words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(tokenizer=tokens, token_pattern=None, stop_words="english")


class RouterFit:
    """A classifier in scikit-learn's grammar: settings here, prompts in ``fit``, what was learned ends in ``_``."""

    def __init__(
        self,
        *,
        classes: int | None = None,
        kind: Kind = "tfidf",
        centres: CentresFrom = "kmeans",
        seed: int = 1,
        embedder: Embedder | None = None,
    ) -> None:
        """``classes`` may be left out where prompts are labelled; ``centres`` from labels are the means of each."""
        self.classes = classes
        self.kind = kind
        self.centres = centres
        self.seed = seed
        self.embedder = embedder

    def fit(self, texts: Sequence[str], labels: Sequence[str] | None = None) -> Self:
        """Fit to these prompts.

        Raises:
            ValueError: too few prompts for the classes, or labels are needed and missing.
        """
        from threadpoolctl import threadpool_limits

        need_scikit_learn()
        count = self._count(texts, labels)
        with threadpool_limits(1):  # sums in one order, so that the same seed gives the same classifier
            self.features_: TfidfFeatures | EmbeddingFeatures = self._features()
            points = self.features_.fit(texts)
            if self.centres == "labels" and labels is not None:
                names = tuple(sorted(set(labels)))
                rows = np.array([names.index(label) for label in labels])
                vectors = np.array([points[rows == row].mean(axis=0) for row in range(count)])
            else:
                vectors, rows = _balanced_clusters(points, count, self.seed)
                names = _names(rows, count, labels, top_terms(texts, rows, count))
                order = np.argsort(names)
                names, vectors, rows = tuple(names[i] for i in order), vectors[order], np.argsort(order)[rows]
            self.top_terms_ = top_terms(texts, rows, count)
        self.assigned_ = rows
        self.points_ = points
        self.centres_ = Centres(names, vectors)
        return self

    def predict(self, texts: Sequence[str]) -> NDArray[np.intp]:
        """Return the class index of each text by scikit-learn itself: what the folded table is held against."""
        from sklearn.metrics import pairwise_distances_argmin

        nearest: NDArray[np.intp] = pairwise_distances_argmin(self.features_.transform(texts), self.centres_.vectors)
        return nearest

    def classifier(self, precision: type[np.floating] = np.float32) -> TfidfClassifier:
        """Return the folded table as it is served; in float64 it is exact."""
        assert isinstance(self.features_, TfidfFeatures)
        centres = Centres(self.centres_.class_names, self.centres_.vectors.astype(precision))
        return TfidfClassifier(self.features_.vocabulary(), self.features_.table().astype(precision), centres)

    def router_file(self, report: dict[str, Any]) -> RouterFile:
        """Return what is to be written to a file."""
        if isinstance(self.features_, TfidfFeatures):
            terms, table = self.features_.vocabulary(), self.features_.table()
            return RouterFile("tfidf", self.centres_, report, vocabulary=terms, table=table)
        embedder = self.features_.embedder
        return RouterFile("embedding", self.centres_, report, model=embedder.model, probe=embedder([PROBE])[0])

    def _features(self) -> TfidfFeatures | EmbeddingFeatures:
        if self.kind == "tfidf":
            return TfidfFeatures(self.seed)
        return EmbeddingFeatures(self.embedder or Embedder(PACKAGED))

    def _count(self, texts: Sequence[str], labels: Sequence[str] | None) -> int:
        if labels is None and (self.classes is None or self.centres == "labels"):
            wanted = "centres from labels" if self.centres == "labels" else "fitting without --classes"
            raise ValueError(f"{wanted} needs prompts with the field class, and these have none")
        known = len(set(labels or ()))
        count = self.classes or known
        if self.centres == "labels" and count != known:
            raise ValueError(f"centres from labels make one class a label, {known} here, not {count}; drop --classes")
        if len(texts) < 2 * count:
            raise ValueError(f"{len(texts)} prompts are too few for {count} classes, give at least {2 * count}")
        return count


def _balanced_clusters(points: Points, count: int, seed: int) -> tuple[Points, NDArray[np.intp]]:
    """Return the centres of clusters of equal size, as far as the numbers divide, and the cluster of each point."""
    from k_means_constrained import KMeansConstrained

    smallest, rest = divmod(len(points), count)
    kmeans = KMeansConstrained(
        count, size_min=smallest, size_max=smallest + bool(rest), n_init=STARTS, random_state=seed
    ).fit(points)
    return kmeans.cluster_centers_, kmeans.labels_.astype(np.intp)


def top_terms(texts: Sequence[str], rows: NDArray[np.intp], count: int, most: int = 8) -> list[list[str]]:
    """Return the terms with the largest mean tf-idf in each class."""
    try:
        vectorizer = tfidf_vectorizer()
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # texts without a word, which embeddings do take
        return [[] for _ in range(count)]
    terms = vectorizer.get_feature_names_out()
    means = [np.asarray(weights[rows == row].mean(axis=0)).ravel() for row in range(count)]
    return [[str(terms[i]) for i in np.argsort(-mean, kind="stable")[:most] if mean[i] > 0] for mean in means]


def _names(rows: NDArray[np.intp], count: int, labels: Sequence[str] | None, terms: list[list[str]]) -> tuple[str, ...]:
    """Name clusters by the labels, so that as many prompts as possible are right and no two share a name.

    Clusters beyond the number of labels, or all where there are no labels, take their top terms.
    """
    from scipy.optimize import linear_sum_assignment

    names = [""] * count
    if labels is not None:
        known = sorted(set(labels))
        overlap = np.array(
            [[np.sum((rows == row) & (np.array(labels) == name)) for name in known] for row in range(count)]
        )
        for row, column in zip(*linear_sum_assignment(-overlap), strict=True):
            names[int(row)] = known[int(column)]
    for number, name in enumerate(names):
        if not name:
            words = [term.strip("#").lower() for term in terms[number]] or ["cluster"]
            options = ["-".join(words[:length]) for length in range(2, len(words) + 1)] + [f"{words[0]}-{number + 1}"]
            names[number] = next(option for option in options if option not in names)
    return tuple(names)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What prompts that were not fitted to were classified as, a row per true label and a column per class."""

    labels: tuple[str, ...]
    class_names: tuple[str, ...]
    counts: NDArray[np.intp]

    @property
    def accuracy(self) -> float:
        """The share that got the class named like their label."""
        right = sum(
            int(self.counts[row, self.class_names.index(label)])
            for row, label in enumerate(self.labels)
            if label in self.class_names
        )
        return right / int(self.counts.sum())


def confusion(labels: Sequence[str], predicted: Sequence[str], class_names: Sequence[str]) -> HeldOut:
    """Count what prompts of each label were classified as."""
    known = tuple(sorted(set(labels)))
    columns = tuple(dict.fromkeys([*class_names, *predicted]))
    counts = np.zeros((len(known), len(columns)), dtype=np.intp)
    np.add.at(counts, ([known.index(label) for label in labels], [columns.index(name) for name in predicted]), 1)
    return HeldOut(known, columns, counts)


def cross_validate(
    fit: RouterFit, texts: Sequence[str], labels: Sequence[str], progress: Progress | None = None
) -> HeldOut | None:
    """Fit five times to four fifths and classify the fifth left out; None where a label has too few prompts for it."""
    from sklearn.model_selection import StratifiedKFold

    if min(list(labels).count(label) for label in set(labels)) < FOLDS:
        return None
    embedder = fit.features_.embedder if isinstance(fit.features_, EmbeddingFeatures) else None
    predicted = [""] * len(texts)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=fit.seed).split(texts, labels)
    for number, (train, test) in enumerate(folds, 1):
        again = RouterFit(classes=fit.classes, kind=fit.kind, centres=fit.centres, seed=fit.seed, embedder=embedder)
        again.fit([texts[i] for i in train], [labels[i] for i in train])
        for i, row in zip(test, again.predict([texts[i] for i in test]), strict=True):
            predicted[i] = again.centres_.class_names[row]
        if progress is not None:
            progress(number / FOLDS)
    return confusion(labels, predicted, fit.centres_.class_names)
