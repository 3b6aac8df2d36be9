"""What an asynchronous engine's host takes to decide and launch a batch, which the device hides or waits for.

Such an engine decides and launches batch ``n + 1`` while the device computes batch ``n``, then waits for ``n``, and
only then hands its tokens over (vLLM's ``step_with_batch_queue``). So the time between the log lines of ``n - 1`` and
``n`` less the wait for ``n`` is the host's work on batch ``n + 1``, and a batch takes the longer of its own work on the
host and on the device. A batch of captured size is launched as one graph when it only decodes, in pieces around the
attention of each layer when it has prefill, and kernel by kernel beyond the largest captured size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

HOST_TERMS = ("per_iteration", "per_request", "in_pieces", "without_graph", "per_prefill_chunk")
"""What the host's time is linear in; see ``sim.profile.HostParameters``."""
SHARE_NOISE = 0.1
"""Standard deviation of an observation, as a share of its time: other threads hold the interpreter's lock meanwhile."""
HUBER = 1.5
_ROUNDS = 30

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFit:
    """A fit of the host's time.

    Attributes:
        terms: seconds by name of HOST_TERMS.
        largest_graph: tokens up to which a batch is launched as a graph, whole or in pieces; 0 without graphs.
    """

    terms: dict[str, float]
    largest_graph: int

    def predict_s(self, works: Floats) -> Floats:
        """Return seconds of iterations, ``works`` as in ``calibrate.fit.iteration_fit.Observations``."""
        return np.asarray(host_design(works, self.largest_graph) @ np.array([self.terms[name] for name in HOST_TERMS]))


def host_design(works: Floats, largest_graph: int) -> Floats:
    """Return what each of HOST_TERMS contributes per unit, shape (observations, terms)."""
    prefill_tokens, chunks, _, _, decodes, _ = works.T
    beyond = prefill_tokens + decodes > largest_graph
    return np.column_stack(
        [np.ones(len(works)), decodes + chunks, (chunks > 0) | beyond, beyond, chunks],
    ).astype(np.float64)


def fit_host(works: Floats, host_s: Floats, noise_s: Floats, graph_sizes: Sequence[int]) -> HostFit:
    """Return the non-negative terms of least Huber loss.

    Args:
        works: shape (observations, 6), as in ``Observations``.
        host_s: shape (observations,), the host's time on each.
        noise_s: likewise, its standard deviation beside a share of itself.
        graph_sizes: captured batch sizes.
    """
    largest = max(graph_sizes, default=0)
    matrix = host_design(works, largest)
    expected_s = np.maximum(host_s, 1e-5)
    weight = np.ones(len(host_s))
    values = np.zeros(matrix.shape[1])
    for _ in range(_ROUNDS):
        deviation_s = np.hypot(SHARE_NOISE * expected_s, noise_s)
        rows = weight / deviation_s
        new, _ = nnls(matrix * rows[:, None], host_s * rows)
        settled = np.allclose(new, values, rtol=1e-6, atol=1e-12)
        values = new
        expected_s = np.maximum(matrix @ values, 1e-5)
        errors = np.abs(expected_s - host_s) / np.hypot(SHARE_NOISE * expected_s, noise_s)
        knee = HUBER * max(1.0, float(np.median(errors)) / 0.6745)
        weight = np.sqrt(knee / np.maximum(errors, knee))
        if settled:
            break
    named = {name: float(value) for name, value in zip(HOST_TERMS, values, strict=True)}
    return HostFit(terms=named, largest_graph=largest)
