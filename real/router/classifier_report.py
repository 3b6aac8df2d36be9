"""What a classifier is worth and what it costs: figures, and the tables that show them."""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from real.router.centres import Explanation
from real.router.classifier_fit import HeldOut, Progress, RouterFit, confusion, cross_validate

WORDS = (50, 500, 2000, 8000)
WORDS_PER_TOKEN = 0.75
"""As everywhere in ``sim``: what turns a time a word into a time a token."""

_LOW_ACCURACY = 0.5
"""Held out, below which a fit of labelled prompts is told how to follow the labels."""

_MOST_SILHOUETTES = 5000  # their time grows with the square of the prompts


class ServiceTime(NamedTuple):
    """How long classifying a prompt of so many words takes."""

    words: int
    p50_s: float
    p99_s: float


def fit_report(
    fit: RouterFit, texts: Sequence[str], labels: Sequence[str] | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Return what the fit was worth, as it is kept in its file. The same prompts and seed give the same report."""
    names = fit.centres_.class_names
    rows = fit.predict(texts)
    shares = np.bincount(rows, minlength=len(names)) / len(rows)
    fitted_shares = np.bincount(fit.assigned_, minlength=len(names)) / len(rows)
    report: dict[str, Any] = {
        "prompts": len(texts),
        "labelled": labels is not None,
        "centres": fit.centres,
        "seed": fit.seed,
        "classes": {
            name: {"share": float(share), "fitted_share": float(fitted_share), "top_terms": terms}
            for name, share, fitted_share, terms in zip(names, shares, fitted_shares, fit.top_terms_, strict=True)
        },
        "largest_to_even_share": float(shares.max() * len(names)),
        "silhouette": _silhouette(fit, rows),
        "scikit_learn": version("scikit-learn"),
    }
    if labels is not None:
        report["accuracy"] = confusion(labels, [names[row] for row in rows], names).accuracy
        held_out = cross_validate(fit, texts, labels, progress)
        if held_out is not None:
            report["held_out_accuracy"] = held_out.accuracy
            report["held_out"] = _nested(held_out)
    if fit.kind == "tfidf":
        served = fit.classifier()
        report["agreement_with_scikit_learn"] = float(np.mean([served.classify(text) for text in texts] == rows))
    return report


def _silhouette(fit: RouterFit, rows: Any) -> float | None:
    from sklearn.metrics import silhouette_score

    if not 2 <= len(np.unique(rows)) < len(rows):
        return None
    sample = min(len(rows), _MOST_SILHOUETTES)
    return float(silhouette_score(fit.points_, rows, sample_size=sample, random_state=fit.seed))


def _nested(counts: HeldOut) -> dict[str, dict[str, int]]:
    return {
        label: {name: int(count) for name, count in zip(counts.class_names, row, strict=True) if count}
        for label, row in zip(counts.labels, counts.counts, strict=True)
    }


def service_times(
    classify: Callable[[str], int], texts: Sequence[str], words: Sequence[int] = WORDS, seconds: float = 0.5
) -> list[ServiceTime]:
    """Time a classifier on texts of these lengths, put together from the words of ``texts``, for some time each."""
    pool = [word for text in texts for word in text.split()]
    found = []
    for length in words:
        starts = range(0, 40 * 997, 997)
        prompts = [" ".join(islice(cycle(pool), start % len(pool), start % len(pool) + length)) for start in starts]
        classify(prompts[0])
        taken: list[float] = []
        end = time.perf_counter() + seconds
        for prompt in cycle(prompts):
            started = time.perf_counter()
            classify(prompt)
            taken.append(time.perf_counter() - started)
            if started > end:
                break
        found.append(ServiceTime(length, float(np.median(taken)), float(np.percentile(taken, 99))))
    return found


# ------------------------------------------------------------------------------------------------------------- tables


def print_fit_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the classes of a fit and what it was worth."""
    table = _table("class", "share %", "while fitting %", "top terms")
    for name, each in report["classes"].items():
        shares = f"{each['share']:.1%}"[:-1], f"{each['fitted_share']:.1%}"[:-1]
        table.add_row(name, *shares, ", ".join(each["top_terms"]))
    console.print(table)
    print_lines(
        console,
        f"{report['prompts']} prompts; the largest class is {report['largest_to_even_share']:.2f} of an even share",
        f"silhouette {report['silhouette']:.3f}" if report["silhouette"] is not None else "silhouette: one class only",
    )
    if "agreement_with_scikit_learn" in report:
        print_lines(console, f"served class as scikit-learn's: {report['agreement_with_scikit_learn']:.1%}")
    if "accuracy" in report:
        held_out = report.get("held_out_accuracy")
        text = f"{held_out:.1%}" if held_out is not None else "too few prompts of a class to tell"
        print_lines(console, f"right by the labels: {report['accuracy']:.1%} of these, of prompts held out {text}")
    if "held_out" in report:
        without = [label for label in report["held_out"] if label not in report["classes"]]
        if without:
            print_lines(console, f"labels without a class of their own count as wrong: {', '.join(without)}")
        print_confusion(report["held_out"], list(report["classes"]), "held out", console)
        if report["centres"] == "kmeans" and report["held_out_accuracy"] < _LOW_ACCURACY:
            print_lines(console, "the clusters are not what the labels mean; --centres labels makes each label a class")


def print_confusion(
    counts: Mapping[str, Mapping[str, int]], class_names: Sequence[str], what: str, console: Console
) -> None:
    """Print how many prompts of each label were classified as what."""
    table = _table(f"{what}: label", *class_names)
    for label, row in counts.items():
        table.add_row(label, *(str(row.get(name, 0)) for name in class_names))
    console.print(table)


def print_fleet_lines(counts: Mapping[str, Mapping[str, int]], times: Sequence[ServiceTime], console: Console) -> None:
    """Print what was found as lines of a fleet file's router, for ``simulate``."""
    medians = np.array([each.p50_s for each in times])
    per_word_s, fixed_s = np.polyfit([each.words for each in times], medians, 1, w=1 / medians)  # right in proportion
    print_lines(
        console,
        "as a router of a fleet file (per_request_s: add what the gateway itself takes):",
        f"  per_request_s: {max(fixed_s, 0):.3g}",
        f"  per_prompt_token_s: {max(per_word_s, 0) * WORDS_PER_TOKEN:.3g} # {WORDS_PER_TOKEN} words a token",
    )
    if counts:
        print_lines(console, "  confusion:")
    for label, row in counts.items():
        print_lines(console, f"    {label}: {{{', '.join(f'{name}: {count}' for name, count in row.items())}}}")


def print_service_times(times: Sequence[ServiceTime], console: Console) -> None:
    """Print how long classifying takes."""
    table = _table("words", "p50 ms", "p99 ms")
    for each in times:
        table.add_row(f"{each.words:,}", f"{each.p50_s * 1e3:.3f}", f"{each.p99_s * 1e3:.3f}")
    console.print(table)


def print_explanation(explanation: Explanation, most: int, console: Console) -> None:
    """Print a class, the distances, and the terms that weigh most."""
    table = _table("class", "distance")
    for name, distance in explanation.distances.items():
        table.add_row(name, f"{distance:.4f}")
    console.print(table)
    against = f" rather than {explanation.next_best}" if explanation.next_best else ""
    print_lines(console, f"{explanation.class_name}{against}, by a margin of {explanation.margin:.4f}, made up of:")
    table = _table("term", "times", "weight")
    for term in explanation.terms[:most]:
        table.add_row(term.term, str(term.count), f"{term.weight:+.4f}")
    rest = explanation.terms[most:]
    if rest:
        table.add_row(f"({len(rest)} more)", "", f"{sum(term.weight for term in rest):+.4f}")
    if not explanation.terms:
        whole = "the prompt as a whole" if explanation.margin != explanation.bias else "no known word"
        table.add_row(f"({whole})", "", f"{explanation.margin - explanation.bias:+.4f}")
    table.add_row("(the centres' lengths)", "", f"{explanation.bias:+.4f}")
    console.print(table)


def print_lines(console: Console, *lines: str) -> None:
    """Print lines as they are: no markup, no highlighting, no folding."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD)
    for name in others:
        table.add_column(name, justify="left" if name == "top terms" else "right")
    return table


def as_counts(labels: Sequence[str], predicted: Sequence[str], class_names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count what prompts of each label were classified as, label by label."""
    return _nested(confusion(labels, predicted, class_names))
