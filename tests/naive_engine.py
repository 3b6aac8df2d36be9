"""The engine once more, without any of its shortcuts: every block by name, every request in every iteration.

Written from the rules in ``sim.engine``'s docstring; slow and obvious, to hold the fast one against.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from sim.fleet import EngineSettings


class NaivePool:
    """Blocks by number. Free ones wait in one queue and keep their content until they are taken from its head."""

    def __init__(self, num_blocks: int):
        self.queue = list(range(num_blocks))
        self._holders = [0] * num_blocks
        self._content: dict[int, Hashable] = {}
        self._place: dict[Hashable, int] = {}  # where a content can be found; a second copy cannot

    @property
    def free(self) -> int:
        return len(self.queue)

    def find(self, contents: Iterable[Hashable]) -> list[int]:
        """The leading blocks that can be found."""
        found = []
        for content in contents:
            if content not in self._place:
                break
            found.append(self._place[content])
        return found

    def free_among(self, blocks: list[int]) -> int:
        return sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self._holders[block]:
                self.queue.remove(block)
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        assert count <= len(self.queue)
        taken, self.queue = self.queue[:count], self.queue[count:]
        for block in taken:
            self._holders[block] = 1
            content = self._content.pop(block, None)
            if self._place.get(content) == block:
                del self._place[content]
        return taken

    def store(self, block: int, content: Hashable) -> None:
        """Note what a block is full of."""
        self._content[block] = content
        self._place.setdefault(content, block)

    def release(self, blocks: list[int]) -> None:
        """Let go of one request's blocks, the last one first; those not full go to the head."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self.queue.insert(len(self.queue) if block in self._content else 0, block)


@dataclass(eq=False, kw_only=True)
class NaiveRequest:
    number: int
    prompt_tokens: int
    output_tokens: int
    prefix: int = 0
    prefix_tokens: int = 0
    computed_tokens: int = 0
    made_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    cached_prompt_tokens: int = -1

    @property
    def known_tokens(self) -> int:
        return self.prompt_tokens + self.made_tokens

    @property
    def done(self) -> bool:
        return self.made_tokens == self.output_tokens

    def content(self, block: int, block_size: int) -> Hashable:
        if (block + 1) * block_size <= min(self.prefix_tokens, self.prompt_tokens):
            return "shared", self.prefix, block
        return "own", self.number, block


class NaiveEngine:
    """Call ``schedule`` once an iteration; it returns who gets how many tokens, and who was preempted."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.pool = NaivePool(settings.num_kv_blocks)
        self.lag = 1 if settings.async_scheduling else 0
        self.iteration = -1
        self.waiting: deque[NaiveRequest] = deque()
        self.arriving: list[tuple[int, NaiveRequest]] = []
        self.running: list[NaiveRequest] = []

    def schedule(self) -> tuple[dict[int, int], list[int]] | None:
        finished = [request for request in self.running if request.done]
        if not self.lag:
            self._give_back(finished)
        self._see_arrivals_before(self.iteration + 1 - self.lag)
        batch = self._next_batch()
        if self.lag:
            self._give_back(finished)
        if batch is None and (self.arriving or self.waiting):
            self._see_arrivals_before(self.iteration + 1)
            batch = self._next_batch()
        if batch is not None:
            self.iteration += 1
        return batch

    def _see_arrivals_before(self, iteration: int) -> None:
        while self.arriving and self.arriving[0][0] < iteration:
            self.waiting.append(self.arriving.pop(0)[1])

    def _give_back(self, finished: list[NaiveRequest]) -> None:
        for request in finished:
            self.running.remove(request)
            self.pool.release(request.blocks)

    def _next_batch(self) -> tuple[dict[int, int], list[int]] | None:
        scheduled: dict[int, int] = {}
        preempted: list[int] = []
        budget = self.settings.max_num_batched_tokens
        for request in [request for request in self.running if not request.done]:
            tokens = min(request.known_tokens - request.computed_tokens, budget)
            while request in self.running and self._blocks_missing(request, tokens) > self.pool.free:
                preempted.append(self._preempt_last())
            if request in self.running and tokens:
                self._compute(request, tokens)
                scheduled[request.number] = tokens
                budget -= tokens
        while not preempted and self.waiting and budget and len(self.running) < self.settings.max_num_seqs:
            tokens = self._admit(self.waiting[0], budget)
            if not tokens:
                break
            scheduled[self.waiting.popleft().number] = tokens
            budget -= tokens
        return (scheduled, preempted) if scheduled or preempted else None

    def _blocks_missing(self, request: NaiveRequest, tokens: int) -> int:
        return -(-(request.computed_tokens + tokens) // self.settings.block_size) - len(request.blocks)

    def _preempt_last(self) -> int:
        victim = [request for request in self.running if not request.done][-1]
        self.running.remove(victim)
        self.pool.release(victim.blocks)
        victim.blocks = []
        victim.computed_tokens = 0
        self.waiting.appendleft(victim)
        return victim.number

    def _admit(self, request: NaiveRequest, budget: int) -> int:
        """Start a request with what it can find; return its first chunk, 0 when it does not fit."""
        block_size = self.settings.block_size
        most = (request.known_tokens - 1) // block_size
        found = self.pool.find(request.content(block, block_size) for block in range(most))
        hit_tokens = len(found) * block_size
        tokens = min(request.known_tokens - hit_tokens, budget)
        must_fit = request.known_tokens if self.settings.scheduler_reserve_full_isl else hit_tokens + tokens
        if -(-must_fit // block_size) - len(found) + self.pool.free_among(found) > self.pool.free:
            return 0
        self.pool.hold(found)
        request.blocks = found
        request.computed_tokens = hit_tokens
        if request.cached_prompt_tokens < 0:
            request.cached_prompt_tokens = hit_tokens
        self.running.append(request)
        self._compute(request, tokens)
        return tokens

    def _compute(self, request: NaiveRequest, tokens: int) -> None:
        block_size = self.settings.block_size
        request.blocks = request.blocks + self.pool.take(self._blocks_missing(request, tokens))
        before = request.computed_tokens // block_size
        request.computed_tokens += tokens
        if self.settings.enable_prefix_caching:
            for block in range(before, request.computed_tokens // block_size):
                self.pool.store(request.blocks[block], request.content(block, block_size))
        request.made_tokens += request.computed_tokens == request.known_tokens
