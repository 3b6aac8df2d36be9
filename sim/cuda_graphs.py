"""Which batch sizes vLLM captures CUDA graphs for, and what a batch is padded to."""

import bisect

from sim.catalogue import Gpu

LARGEST_GRAPH_TOKENS = 512
LARGEST_GRAPH_TOKENS_BLACKWELL = 1024
_BLACKWELL_COMPUTE_CAPABILITY = 10.0


def capture_sizes(*, max_num_seqs: int, max_num_batched_tokens: int, gpu: Gpu) -> tuple[int, ...]:
    """Return the captured batch sizes in tokens, ascending.

    1, 2, 4, then every 8th up to 248, then every 16th; ``max_num_seqs`` and the token budget as well where they are not
    above the largest. The largest is twice ``max_num_seqs``, but at most 512 (1024 on data-centre Blackwell) and at
    most the token budget. None on a CPU. Source: vLLM 0.32.0 and 0.33.0, ``vllm/config/vllm.py``,
    ``_set_cudagraph_sizes``.
    """
    if gpu.kind == "cpu":
        return ()
    blackwell = gpu.compute_capability >= _BLACKWELL_COMPUTE_CAPABILITY
    limit = LARGEST_GRAPH_TOKENS_BLACKWELL if blackwell else LARGEST_GRAPH_TOKENS
    largest = min(2 * max_num_seqs, limit, max_num_batched_tokens)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16), max_num_seqs, max_num_batched_tokens}
    return tuple(sorted(size for size in sizes if size <= largest))


def padded_tokens(tokens: int, sizes: tuple[int, ...]) -> int | None:
    """Return the captured size that a batch of ``tokens`` runs at, or None when it is above the largest: no graph."""
    place = bisect.bisect_left(sizes, tokens)
    return sizes[place] if place < len(sizes) else None
