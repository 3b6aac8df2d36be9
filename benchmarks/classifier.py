"""The classifier as it is served beside scikit-learn's pipeline: ``python -m benchmarks.classifier``.

Fits to half of the packaged prompts and classifies the other half, alone and joined to length. One thread on one core,
which this process asks for itself; the machine should have nothing else to do. ``--embedding`` adds the embedding
classifier, which needs the extra ``embeddings``.
"""

import os
import sys

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))  # before numpy

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from real.router.classifier_fit import EmbeddingFeatures, RouterFit
from real.router.classifier_report import WORDS, service_times
from real.router.embedding import EmbeddingClassifier
from real.router.labelled_prompts import read_packaged_prompts

SECONDS = 4.0


def joined(texts: Sequence[str], words: int, count: int) -> list[str]:
    """Return ``count`` texts of so many words, put together from these."""
    pool = " ".join(texts).split() * (1 + words // 1000)
    return [" ".join(pool[start : start + words]) for start in range(0, count * 37, 37)]


def agreement(one: Sequence[int], other: Sequence[int]) -> str:
    """Return the share of equal answers."""
    return f"{np.mean(np.array(one) == np.array(other)):.2%}"


def main() -> None:
    """Run and print the table."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    prompts = read_packaged_prompts()
    assert prompts.labels is not None
    train, test = prompts.texts[::2], prompts.texts[1::2]
    console = Console()
    table = Table("ms: p50 / p99", *(f"{words:,} words" for words in WORDS))
    for column in table.columns[1:]:
        column.justify = "right"

    def add_times(name: str, classify: Callable[[str], int]) -> None:
        times = service_times(classify, test, WORDS, SECONDS)
        table.add_row(name, *(f"{each.p50_s * 1e3:.3f} / {each.p99_s * 1e3:.3f}" for each in times))

    fit = RouterFit(centres="labels").fit(train, prompts.labels[::2])
    served, exact = fit.classifier(), fit.classifier(np.float64)
    add_times("TF-IDF, served", served.classify)
    add_times("TF-IDF in float64", exact.classify)
    add_times("scikit-learn", lambda text: int(fit.predict([text])[0]))
    if "--embedding" in sys.argv:
        by_meaning = _embedding(train, prompts.labels[::2])
        add_times("embedding", by_meaning.classify)
    console.print(table)
    console.print("targets: 500 words 0.3 / 0.6, 8,000 words p99 7", style="dim")
    texts = [*test, *(text for words in WORDS for text in joined(test, words, 100))]
    expected = list(fit.predict(texts))
    for name, classifier in (("float32", served), ("float64", exact)):
        same = agreement([classifier.classify(text) for text in texts], expected)
        console.print(f"{name}: scikit-learn's class for {same} of {len(texts)} texts not fitted to", highlight=False)
    console.print("targets: 99.8 %, 100 %", style="dim")


def _embedding(train: Sequence[str], labels: Sequence[str]) -> EmbeddingClassifier:
    fit = RouterFit(kind="embedding", centres="labels").fit(train, labels)
    assert isinstance(fit.features_, EmbeddingFeatures)
    return EmbeddingClassifier(fit.features_.embedder, fit.centres_)


if __name__ == "__main__":
    main()
