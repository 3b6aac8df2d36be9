"""``expert-router router``: fit the classifier of prompts, ask it why, and tell what it is worth."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np
from rich.console import Console

from sim.report import wide_console

if TYPE_CHECKING:
    from real.router.classifier import FittedClassifier
    from real.router.labelled_prompts import LabelledPrompts

_HELP = {"help_option_names": ["-h", "--help"]}
_classifier_option = click.option(
    "--classifier",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file that router fit wrote; default: the packaged classifier.",
)


@click.group("router", context_settings=_HELP)
def command() -> None:
    """Fit the classifier that tells the router what class a prompt is of, and see what it does."""


@command.command("fit", context_settings=_HELP)
@click.argument("prompts", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--classes", type=click.IntRange(min=1), help="How many; default: as many as the prompts have labels.")
@click.option("--kind", type=click.Choice(["tfidf", "embedding"]), default="tfidf", show_default=True)
@click.option(
    "--centres",
    type=click.Choice(["kmeans", "labels"]),
    default="kmeans",
    show_default=True,
    help="kmeans: balanced clusters, as in the paper, named by labels or terms. labels: the mean of each label.",
)
@click.option(
    "--model", help="Of --kind embedding: the folder of a sentence-transformers model; default: the packaged."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("router.npz"), show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
def fit_command(
    prompts: Path,
    classes: int | None,
    kind: Literal["tfidf", "embedding"],
    centres: Literal["kmeans", "labels"],
    model: str | None,
    out: Path,
    seed: int,
) -> None:
    """Fit a classifier to PROMPTS, a file of {"text": ..., "class": ...} a line; "class" may be left out of all.

    Prints the classes, how even they are, how well they agree with the labels on prompts not fitted to, and how long
    classifying takes. The same prompts and seed write the same file.
    """
    if model is not None and kind != "embedding":
        raise click.UsageError("--model is of --kind embedding only")
    console, messages = wide_console(), Console(stderr=True)
    with mistakes_in_red(messages):
        from real.router.classifier_fit import RouterFit, need_scikit_learn
        from real.router.classifier_report import fit_report, print_fit_report, print_service_times, service_times
        from real.router.embedding import PACKAGED, Embedder
        from real.router.labelled_prompts import read_prompts
        from real.router.router_file import write_router_file
        from sim.simulate_command import progress_bar

        need_scikit_learn()
        given = read_prompts(prompts)
        embedder = Embedder(model or PACKAGED) if kind == "embedding" else None
        with progress_bar(messages, "fitting") as progress:
            fit = RouterFit(classes=classes, kind=kind, centres=centres, seed=seed, embedder=embedder)
            fit.fit(given.texts, given.labels)
            report = fit_report(fit, given.texts, given.labels, progress)
        content = fit.router_file(report)
        write_router_file(content, out)
        print_fit_report(report, console)
        print_service_times(service_times(_loaded(out)[0].classify, given.texts), console)
    messages.print(f"wrote {out} ({out.stat().st_size:,} bytes)", highlight=False, markup=False)


@command.command("explain", context_settings=_HELP)
@click.argument("text")
@_classifier_option
@click.option("--terms", type=click.IntRange(min=1), default=12, show_default=True, help="How many to show.")
def explain_command(text: str, file: Path | None, terms: int) -> None:
    """Show which class TEXT gets ("-" reads it from standard input), how near it is to each, and which terms decide."""
    with mistakes_in_red(Console(stderr=True)):
        from real.router.classifier_report import print_explanation

        if text == "-":
            text = sys.stdin.read()
        print_explanation(_loaded(file)[0].explain(text), terms, wide_console())


@command.command("evaluate", context_settings=_HELP)
@click.argument("prompts", type=click.Path(dir_okay=False, path_type=Path), required=False)
@_classifier_option
def evaluate_command(prompts: Path | None, file: Path | None) -> None:
    """Tell how a classifier does on PROMPTS (default: the packaged ones): shares, accuracy, time.

    Ends with the lines that tell ``simulate`` of it: the router's service time and its confusion of classes.
    """
    console = wide_console()
    with mistakes_in_red(Console(stderr=True)):
        from real.router.classifier_report import (
            as_counts,
            print_confusion,
            print_fleet_lines,
            print_lines,
            print_service_times,
            service_times,
        )
        from real.router.labelled_prompts import read_packaged_prompts, read_prompts

        given = read_packaged_prompts() if prompts is None else read_prompts(prompts)
        classifier, report = _loaded(file)
        names = classifier.class_names
        predicted = [names[classifier.classify(text)] for text in given.texts]
        counts = {} if given.labels is None else as_counts(given.labels, predicted, names)
        for name in names:
            print_lines(console, f"{predicted.count(name) / len(predicted):6.1%}  {name}")
        if given.labels is not None:
            _print_accuracy(given, predicted, names, report, console)
            print_confusion(counts, names, "all", console)
        times = service_times(classifier.classify, given.texts)
        print_service_times(times, console)
        print_fleet_lines(counts, times, console)


def _print_accuracy(
    given: "LabelledPrompts", predicted: list[str], names: tuple[str, ...], report: dict[str, Any], console: Console
) -> None:
    from real.router.classifier_report import print_lines

    assert given.labels is not None
    right = float(np.mean([label == name for label, name in zip(given.labels, predicted, strict=True)]))
    print_lines(console, f"right by the labels: {right:.1%} of {len(predicted)} prompts")
    if (held_out := report.get("held_out_accuracy")) is not None:
        print_lines(console, f"when it was fitted, of prompts held out: {held_out:.1%}")
    unknown = sorted(set(given.labels) - set(names))
    if unknown:
        print_lines(console, f"labels that are not classes of this classifier: {', '.join(unknown)}")


def _loaded(file: Path | None) -> "tuple[FittedClassifier, dict[str, Any]]":
    """Return a classifier and the report of its fit."""
    from real.router.classifier import fitted_classifier, read_packaged
    from real.router.router_file import read_router_file

    content = read_packaged() if file is None else read_router_file(file)
    return fitted_classifier(content, str(file or "the packaged classifier")), content.report


@contextmanager
def mistakes_in_red(messages: Console) -> Iterator[None]:
    """Say what is wrong with the input in one line, and exit with 2."""
    try:
        yield
    except ValueError as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
