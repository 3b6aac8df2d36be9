"""What the fleet's classifier takes the requests of a run for: their prompts can be written before they are sent."""

from collections.abc import Callable, Sequence

from real.router.classifier import Classifier, load_classifier
from real.users.prepared_requests import prompt_request
from real.users.prompts import PromptWriter, read_corpus, texts_of_classes
from real.users.run import prompt_writers
from sim.measuring import replication_seed
from sim.request import Request
from sim.resolve import resolve_fleet, routes_by_class
from sim.spec import FleetFile


class TakenFor:
    """Writes a request's prompt as real users would and classifies it; remembers the answer.

    Which texts a prompt is made of depends on the request and the seed. Only its leading numbers are a real run's own,
    and a classifier takes all numbers for one.
    """

    def __init__(self, writers: Sequence[PromptWriter], classifier: Classifier, seed: int) -> None:
        """Prepare.

        Args:
            writers: one a class of the workload.
            classifier: of the fleet.
            seed: of the run's traffic.
        """
        self._writers = writers
        self._classifier = classifier
        self._seed = seed
        self._known: dict[tuple[int, int, int], int] = {}

    def __call__(self, request: Request) -> int:
        """Return the index of the class that the request's prompt is taken for."""
        key = request.request_id, request.class_index, request.prompt_tokens
        if key not in self._known:
            asked = prompt_request(request, seed=self._seed, first_number=0)
            (prompt,) = self._writers[request.class_index].write([asked])
            self._known[key] = self._classifier.classify(prompt.text)
        return self._known[key]


def taken_for(file: FleetFile, fleet: str) -> Callable[[Request], int] | None:
    """Return what tells the class of a run's requests; None where the class decides nothing.

    Raises:
        ValueError: the classifier cannot be loaded, or a class has no texts.
    """
    classes = list(file.workload.classes)
    if file.fleets[fleet].router is None or not routes_by_class(file.fleets[fleet]) or len(classes) == 1:
        return None
    writers = prompt_writers(file, resolve_fleet(file, fleet), texts_of_classes(read_corpus(), classes))
    return TakenFor(writers, load_classifier(file.serve.classifier, classes), replication_seed(file.run.seed, 0))
