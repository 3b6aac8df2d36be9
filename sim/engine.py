"""One vLLM engine as a pure state machine: which requests get how many tokens in the next iteration.

Mirrors vLLM's V1 scheduler (``vllm/v1/core/sched/scheduler.py``), first come first served with chunked prefill:

1. Running requests first, in admission order; a decode takes one token, an unfinished prompt what the budget leaves.
2. A running request that gets no KV block preempts the last of the running ones, possibly itself. The victim's blocks
   are freed, it starts over, and goes to the *front* of the waiting queue. Nothing is admitted in such an iteration.
3. Otherwise waiting requests are admitted in order while budget, ``max_num_seqs`` and blocks last; the first that does
   not fit stops admission. With ``scheduler_reserve_full_isl`` a prompt must fit as a whole, not only its first chunk.
4. Prefix hits are whole blocks and never the whole prompt.

A decoding request costs nothing per iteration. Its state follows from the iteration number: its computed tokens are
``iteration + offset``, it needs a new block when that is a multiple of the block size, and its last iteration is known
when it starts to decode. So counts by phase and by last iteration stand for the whole batch, and a run of decode-only
iterations is one step (``run_length``, ``finish_run``).

Asynchronous scheduling decides a batch while the one before it still runs: what happens during iteration ``k`` (an
arrival, a finished request's slot and blocks) is seen by the batch ``k + 2`` instead of ``k + 1``. That is the only
difference, kept here as ``lag`` (1 or 0).
"""

import heapq
from collections import deque
from typing import Any, Generic, NamedTuple, TypeVar

from sim.fleet import EngineSettings
from sim.kv_cache import KvCache, PreemptedBlocks, PrefixGroup
from sim.service_curve import IterationWork


class EngineRequest:
    """A request as the engine knows it, and what it has of it.

    Attributes:
        group: the prefix it shares with others, or None.
        generated_tokens: output tokens made before it was last (re)started.
        offset: computed tokens minus iteration number, while decoding.
        last_iteration: the iteration that makes its last token, while decoding; else -1.
        cached_prompt_tokens: prefix hits at its first admission; -1 before.
    """

    __slots__ = (
        "cached_prompt_tokens",
        "computed_tokens",
        "generated_tokens",
        "group",
        "held_blocks",
        "last_iteration",
        "left_behind",
        "offset",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
        "shared_depth",
    )

    def __init__(self, prompt_tokens: int, output_tokens: int, group: PrefixGroup | None = None):
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.group = group
        self.generated_tokens = 0
        self.computed_tokens = 0  # while prefilling; decoding: see offset
        self.offset = 0
        self.last_iteration = -1
        self.held_blocks = 0  # while prefilling; decoding: follows from offset
        self.shared_depth = 0
        self.left_behind: PreemptedBlocks | None = None
        self.cached_prompt_tokens = -1
        self.preemptions = 0


R = TypeVar("R", bound=EngineRequest)


class Batch(NamedTuple, Generic[R]):
    """One scheduled iteration.

    Attributes:
        iteration: its number.
        chunks: (request, tokens) of prefill, resumed ones included.
        admitted: requests that left the waiting queue for this iteration.
        preempted: requests sent back to the waiting queue by this scheduling step, in order.
        decodes: how many requests decode one token.
        decode_kv_tokens: tokens whose KV those read.
    """

    iteration: int
    chunks: list[tuple[R, int]]
    admitted: list[R]
    preempted: list[R]
    decodes: int
    decode_kv_tokens: int


_NOBODY: list[Any] = []  # shared empty list: most iterations admit and preempt nobody


class Engine(Generic[R]):
    """The scheduler state of one engine. Call ``schedule``, let time pass, ``finish_run``, and again.

    Attributes:
        iteration: number of the iteration scheduled last; -1 before the first.
        waiting: requests not running, in queue order.
        running: requests that hold a slot, in admission order.
    """

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.kv = KvCache(settings.num_kv_blocks, settings.block_size)
        self.lag = 1 if settings.async_scheduling else 0
        self.iteration = -1
        self.waiting: deque[R] = deque()
        self.running: dict[R, None] = {}
        self._arriving: deque[tuple[int, R]] = deque()  # (iteration in flight at arrival, request)
        self._finished: list[R] = []  # of the last iteration, slot and blocks not yet given back
        self._prefilling: R | None = None  # at most one prompt is cut by the budget, the last admitted
        self._batch: Batch[R] | None = None
        self._retry_next = False  # something was freed after the batch was decided, and somebody waits for it
        # The decoding requests, as counts.
        self._decodes = 0
        self._decode_kv_tokens = 0  # to be read in the next iteration
        self._phase_counts = [0] * settings.block_size  # by -offset modulo block size
        self._by_last_iteration: dict[int, list[R]] = {}
        self._last_iterations: list[int] = []  # heap of the keys

    # ------------------------------------------------------------------------------------------------- arrivals

    def add(self, request: R, iteration_in_flight: int | None = None) -> None:
        """Queue a request that arrives while this iteration runs (None: the engine is idle)."""
        if iteration_in_flight is None:
            self.waiting.append(request)
        else:
            self._arriving.append((iteration_in_flight, request))

    @property
    def arriving(self) -> list[R]:
        """Requests that arrived and are not yet seen by the scheduler."""
        return [request for _, request in self._arriving]

    @property
    def queued(self) -> int:
        """Requests that arrived and do not run."""
        return len(self.waiting) + len(self._arriving)

    # ----------------------------------------------------------------------------------------------- scheduling

    def schedule(self) -> Batch[R] | None:
        """Decide the next iteration; None when there is nothing to compute."""
        iteration = self.iteration + 1
        if not self.lag and self._finished:
            self._give_back_finished()
        arriving = self._arriving
        while arriving and arriving[0][0] < iteration - self.lag:
            self.waiting.append(arriving.popleft()[1])

        batch = self._next_batch(iteration)
        self._retry_next = False
        if self.lag and self._finished:
            self._give_back_finished()
            self._retry_next = bool(self.waiting)
        if batch is None and (arriving or self.waiting):
            # The engine found nothing to run ahead; by the end of the iteration it sees everything.
            self.waiting.extend(request for _, request in arriving)
            arriving.clear()
            batch = self._next_batch(iteration)
        if batch is not None:
            self.iteration = iteration
        self._batch = batch
        return batch

    def _next_batch(self, iteration: int) -> Batch[R] | None:
        settings, kv = self.settings, self.kv
        prefilling = self._prefilling
        budget = settings.max_num_batched_tokens - self._decodes
        chunk = chunk_blocks = 0
        if prefilling is not None:
            tokens = prefilling.prompt_tokens + prefilling.generated_tokens
            chunk = min(tokens - prefilling.computed_tokens, budget)
            chunk_blocks = self._blocks_for_chunk(prefilling, chunk)
        new_blocks = self._phase_counts[iteration % settings.block_size] + chunk_blocks
        if new_blocks > kv.free:
            preempted = self._grow_by_preempting(iteration)
            return Batch(iteration, [], _NOBODY, preempted, self._decodes, self._decode_kv_tokens)

        if new_blocks:
            kv.take(new_blocks)
        decodes, decode_kv_tokens = self._decodes, self._decode_kv_tokens
        chunks: list[tuple[R, int]] = []
        if chunk and prefilling is not None:
            prefilling.held_blocks += chunk_blocks
            self._compute(prefilling, chunk, iteration)
            chunks.append((prefilling, chunk))
            budget -= chunk
        admitted = self._admit(iteration, budget, chunks) if self.waiting else _NOBODY
        if not decodes and not chunks:
            return None
        return Batch(iteration, chunks, admitted, _NOBODY, decodes, decode_kv_tokens)

    def _blocks_for_chunk(self, request: R, tokens: int) -> int:
        return -(-(request.computed_tokens + tokens) // self.settings.block_size) - request.held_blocks

    def _admit(self, iteration: int, budget: int, chunks: list[tuple[R, int]]) -> list[R]:
        settings, kv, waiting, running = self.settings, self.kv, self.waiting, self.running
        block_size, caching = settings.block_size, settings.enable_prefix_caching
        admitted = []
        while waiting and budget > 0 and len(running) < settings.max_num_seqs:
            request = waiting[0]
            tokens = request.prompt_tokens + request.generated_tokens
            depth = own_hits = hit_blocks = pulled = 0
            if caching and (request.group is not None or request.left_behind is not None):
                depth, own_hits = self._hits(request, tokens)
                hit_blocks = depth + own_hits
                pulled = (kv.free_among(request.group, depth) if request.group is not None else 0) + own_hits
            chunk = tokens - hit_blocks * block_size
            if chunk > budget:
                chunk = budget
            must_fit = tokens if settings.scheduler_reserve_full_isl else hit_blocks * block_size + chunk
            if -(-must_fit // block_size) - hit_blocks + pulled > kv.free:
                break
            waiting.popleft()
            if depth and request.group is not None:
                kv.hold_shared(request.group, depth)
            if own_hits and request.left_behind is not None:
                kv.reclaim(request.left_behind, own_hits)
            request.left_behind = None
            request.shared_depth = depth
            request.computed_tokens = hit_blocks * block_size
            request.held_blocks = hit_blocks
            if request.cached_prompt_tokens < 0:
                request.cached_prompt_tokens = request.computed_tokens
            new_blocks = self._blocks_for_chunk(request, chunk)
            kv.take(new_blocks)
            request.held_blocks += new_blocks
            running[request] = None
            self._compute(request, chunk, iteration)
            chunks.append((request, chunk))
            admitted.append(request)
            budget -= chunk
        return admitted

    def _hits(self, request: R, tokens: int) -> tuple[int, int]:
        """Findable leading blocks: of the shared prefix, and of what the request itself left behind."""
        most = (tokens - 1) // self.settings.block_size
        group = request.group
        depth = 0
        if group is not None:
            shared = self._shared_blocks(request, tokens)
            depth = min(group.cached, shared, most)
            if depth < shared:
                return depth, 0
        left_behind = request.left_behind
        return depth, min(left_behind.cached, most - depth) if left_behind is not None else 0

    def _shared_blocks(self, request: R, tokens: int) -> int:
        """How many whole blocks of a request's first tokens are the beginning it shares with others."""
        if request.group is None:
            return 0
        return min(request.group.blocks, min(tokens, request.prompt_tokens) // self.settings.block_size)

    def _compute(self, request: R, chunk: int, iteration: int) -> None:
        """Count a scheduled chunk as computed; a prompt thereby complete decodes from the next iteration on."""
        request.computed_tokens += chunk
        computed = request.computed_tokens
        group = request.group
        if group is not None and self.settings.enable_prefix_caching:
            # A block can be found from the step that schedules it. Where the request recomputes a block that can be
            # found already (a full hit recomputes the last one), the copy is its own and nobody finds it.
            shared = self._shared_blocks(request, computed)
            if group.cached == request.shared_depth < shared:
                group.deepen(request.shared_depth, shared)
                request.shared_depth = shared
        if computed < request.prompt_tokens + request.generated_tokens:
            self._prefilling = request
            return
        if request is self._prefilling:
            self._prefilling = None
        request.last_iteration = last = iteration + request.output_tokens - request.generated_tokens - 1
        bucket = self._by_last_iteration.get(last)
        if bucket is None:
            self._by_last_iteration[last] = [request]
            heapq.heappush(self._last_iterations, last)
        else:
            bucket.append(request)
        request.offset = computed - iteration - 1
        if last > iteration:
            self._decodes += 1
            self._decode_kv_tokens += computed + 1
            self._phase_counts[-request.offset % self.settings.block_size] += 1

    # ----------------------------------------------------------------------------------------------- preemption

    def _grow_by_preempting(self, iteration: int) -> list[R]:
        """Give each decoding request its block in order, preempting from the end; return the victims in order.

        A prompt cut by the budget is the last of the running ones, so it is the first victim.
        """
        kv = self.kv
        preempted: list[R] = []
        scheduled = [r for r in self.running if r is self._prefilling or r.last_iteration >= iteration]
        growing = iter(tuple(scheduled))
        request = next(growing, None)
        while request is not None and request in self.running:
            grows = request is self._prefilling or (iteration + request.offset) % self.settings.block_size == 0
            if grows and (not kv.free or request is self._prefilling):
                victim = scheduled.pop()
                self._preempt(victim, iteration)
                preempted.append(victim)
            else:
                kv.take(1 if grows else 0)
                request = next(growing, None)
        return preempted

    def _preempt(self, victim: R, iteration: int) -> None:
        kv = self.kv
        block_size = self.settings.block_size
        del self.running[victim]
        if victim is self._prefilling:
            self._prefilling = None
        else:
            computed = victim.computed_tokens = iteration + victim.offset
            victim.held_blocks = -(-computed // block_size)
            victim.generated_tokens = victim.output_tokens - (victim.last_iteration - iteration) - 1
            self._leave_decodes(victim, iteration)
            self._by_last_iteration[victim.last_iteration].remove(victim)
            victim.last_iteration = -1
        full = victim.computed_tokens // block_size - victim.shared_depth
        # Copies of shared blocks that it computed itself lie before its own and are found as shared ones or not at all.
        copies = max(0, self._shared_blocks(victim, victim.computed_tokens) - victim.shared_depth)
        if full > copies and self.settings.enable_prefix_caching:
            victim.left_behind = PreemptedBlocks(full - copies)
        kv.give_back(full - copies, victim.held_blocks - victim.shared_depth - full, victim.left_behind)
        kv.give_back(copies, 0)
        if victim.group is not None:
            kv.give_back_shared(victim.group, victim.shared_depth)
        victim.held_blocks = victim.shared_depth = victim.computed_tokens = 0
        victim.preemptions += 1
        self.waiting.appendleft(victim)

    def _leave_decodes(self, request: R, iteration: int) -> None:
        """Take a request out of the decode counts, as they stand before ``iteration``."""
        self._decodes -= 1
        self._decode_kv_tokens -= iteration + request.offset + 1
        self._phase_counts[-request.offset % self.settings.block_size] -= 1

    # ------------------------------------------------------------------------------------------ decode-only runs

    def run_length(self) -> int:
        """How many iterations, the scheduled one included, are decode-only with the same requests."""
        batch = self._batch
        assert batch is not None, "run_length() without a scheduled batch"
        iteration = self.iteration
        if batch.chunks or batch.preempted or self._retry_next:
            return 1
        last_iterations = self._last_iterations
        while not self._by_last_iteration[last_iterations[0]]:  # emptied by preemption
            del self._by_last_iteration[heapq.heappop(last_iterations)]
        length = last_iterations[0] - iteration + 1
        if self._arriving and not self.waiting:  # behind a head that does not fit, an arrival changes nothing
            length = min(length, self._arriving[0][0] + 1 + self.lag - iteration)
        # Blocks for all following iterations, or up to the one that runs out.
        free = self.kv.free
        if free < (length // self.settings.block_size + 1) * batch.decodes:
            counts, block_size = self._phase_counts, self.settings.block_size
            for further in range(1, length):
                free -= counts[(iteration + further) % block_size]
                if free < 0:
                    return further
        return length

    def finish_run(self, iterations: int) -> list[R]:
        """Let the scheduled batch and the like ones after it (``iterations`` in all) be done; return who finished.

        Their slots and blocks are given back when a scheduler would see it, see ``lag``.
        """
        batch = self._batch
        assert batch is not None, "finish_run() without a scheduled batch"
        if iterations > 1:
            self.kv.take(self._blocks_for_run(iterations))
            self.iteration += iterations - 1
        self._decode_kv_tokens += batch.decodes * iterations
        iteration = self.iteration
        finished = _NOBODY
        if self._last_iterations and self._last_iterations[0] <= iteration:
            finished = self._by_last_iteration.pop(heapq.heappop(self._last_iterations))
            for request in finished:
                # Those whose only token came with their prompt never decoded.
                if request.offset + request.last_iteration + 1 > request.prompt_tokens + request.generated_tokens:
                    self._leave_decodes(request, iteration + 1)
            self._finished.extend(finished)
        return finished

    def _blocks_for_run(self, iterations: int) -> int:
        cycles, rest = divmod(iterations - 1, self.settings.block_size)
        counts, block_size, first = self._phase_counts, self.settings.block_size, self.iteration + 1
        return cycles * self._decodes + sum(counts[(first + i) % block_size] for i in range(rest))

    def _give_back_finished(self) -> None:
        kv = self.kv
        block_size = self.settings.block_size
        for request in self._finished:
            del self.running[request]
            full, part = divmod(request.last_iteration + 1 + request.offset, block_size)
            kv.give_back(full - request.shared_depth, 1 if part else 0)
            if request.group is not None:
                kv.give_back_shared(request.group, request.shared_depth)
        self._finished.clear()

    # -------------------------------------------------------------------------------------------------- looking

    def work(self, batch: Batch[R]) -> IterationWork:
        """What the batch computes, for the service curve. Call before the next ``schedule``."""
        tokens = pairs = kv_tokens = 0
        for request, chunk in batch.chunks:
            # A completed prompt's computed_tokens is its prompt; see EngineRequest.
            before = request.computed_tokens - chunk
            tokens += chunk
            pairs += chunk * before + chunk * (chunk + 1) // 2
            kv_tokens += before + chunk
        return IterationWork(tokens, len(batch.chunks), pairs, kv_tokens, batch.decodes, batch.decode_kv_tokens)

    def decoding(self, iteration: int) -> list[R]:
        """Requests that decode in the iteration scheduled last (linear in the batch; for looking, not for speed)."""
        admitted_now = {request for request, _ in self._batch.chunks} if self._batch else set()
        return [r for r in self.running if r.last_iteration >= iteration and r not in admitted_now]

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use."""
        return 1 - self.kv.free / self.kv.num_blocks
