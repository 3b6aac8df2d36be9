"""What the file's classifier takes prompts of each class for: the prompts that real users would send, classified."""

import numpy as np

from sim.fleet_file import LoadedFleetFile
from sim.resolve import resolve_fleet, routes_by_class
from sim.spec import FleetFile
from sim.streams import stream
from sim.traces import read_workload_data
from sim.traffic import sample_tokens

PROMPTS_PER_CLASS = 500


def router_confusion(file: LoadedFleetFile | FleetFile, fleet: str) -> dict[str, dict[str, float]] | None:
    """Return class -> class it is taken for -> share of prompts; None where the class decides nothing.

    Prompts are made of the packaged texts, in the lengths of the workload (a trace keeps its own, which play no part
    here), as ``run`` makes them. What the classifier was fitted to may be among the texts, as it may be for ``run``.

    Raises:
        ValueError: the classifier cannot be loaded, or a class has no texts.
    """
    from real.router.classifier import load_classifier
    from real.users.prompts import PromptRequest, read_corpus, texts_of_classes
    from real.users.run import prompt_writers

    spec = file.fleets[fleet]
    classes = list(file.workload.classes)
    if spec.router is None or not routes_by_class(spec) or len(classes) == 1:
        return None
    classifier = load_classifier(file.serve.classifier, classes)
    writers = prompt_writers(file, resolve_fleet(file, fleet), texts_of_classes(read_corpus(), classes))
    data = read_workload_data(file.workload)
    shares: dict[str, dict[str, float]] = {}
    for index, (name, of_class) in enumerate(file.workload.classes.items()):
        uniforms = stream(0, "confusion lengths", index).random(PROMPTS_PER_CLASS)
        picks = stream(0, "confusion texts", index).integers(0, 2**31, PROMPTS_PER_CLASS)
        lengths = sample_tokens(of_class.prompt_tokens, uniforms, data)
        prompts = writers[index].write(
            [
                PromptRequest(int(tokens), number, int(pick))
                for number, (tokens, pick) in enumerate(zip(lengths, picks, strict=True))
            ]
        )
        taken_for = np.array([classifier.classify(prompt.text) for prompt in prompts])
        counts = np.bincount(taken_for, minlength=len(classes)) / PROMPTS_PER_CLASS
        shares[name] = {other: float(share) for other, share in zip(classes, counts, strict=True)}
    return shares
