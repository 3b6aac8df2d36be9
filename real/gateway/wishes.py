"""Where a request may go: to an expert by its model, or to those of its class, told by a header or the classifier."""

import time
from typing import Final

from real.gateway.classification import Classification, ClassifierBusyError
from real.gateway.completion_request import CompletionRequest
from real.gateway.config import GatewayConfig
from real.gateway.error_events import Refusal
from real.gateway.metrics import Outcome
from real.gateway.replicas import Routing
from sim.usable_replicas import Wish

CLASS_HEADER: Final = "x-expert-router-class"


class Wishes:
    """The wishes of one fleet's clients."""

    def __init__(self, config: GatewayConfig, routing: Routing, classification: Classification | None) -> None:
        """``classification`` is None where no class decides."""
        self._classes = config.classes
        self._class_index = {name: index for index, name in enumerate(config.classes)}
        self._virtual = frozenset(config.virtual_models)
        self._routing = routing
        self._classification = classification

    async def of(self, completion: CompletionRequest, given_class: str | None, outcome: Outcome) -> Wish:
        """Return where a request may go, and note its class; ``given_class`` is what its client says.

        Raises:
            Refusal: its model or class is unknown, or there is no telling it.
        """
        model = completion.model
        named = None
        if model is not None and model not in self._virtual:
            named = self._routing.of_expert(model)
            if named is None:
                raise Refusal("client_error", 404, f"the model {model!r} does not exist", param="model")
        if given_class is not None:
            if given_class not in self._class_index:
                known = ", ".join(self._class_index)
                raise Refusal("client_error", 400, f"{CLASS_HEADER} must be one of {known}; got {given_class!r}")
            outcome.class_name = given_class
        elif self._classification is not None and named is None:
            outcome.class_name = self._classes[await self._classified(self._classification, completion, outcome)]
        elif len(self._classes) == 1:
            outcome.class_name = self._classes[0]
        if named is not None:
            return named
        if not outcome.class_name:
            return self._routing.everyone
        return self._routing.of_class(self._class_index[outcome.class_name])

    async def _classified(self, classification: Classification, completion: CompletionRequest, outcome: Outcome) -> int:
        if completion.text is None:
            message = f"a prompt of token ids cannot be classified; send text, an expert's model or {CLASS_HEADER}"
            raise Refusal("client_error", 400, message, param="prompt")
        began_s = time.perf_counter()
        try:
            index = await classification.classify(completion.text)
        except ClassifierBusyError:
            message = "too many prompts wait to be classified; try again later"
            raise Refusal("queue_full", 429, message, retry_after_s=1.0) from None
        outcome.classify_s = time.perf_counter() - began_s
        return index
