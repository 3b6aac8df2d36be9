"""KV blocks of one engine: how many are free, and which freed ones can still be found by their content.

Mirrors vLLM's block pool (``vllm/v1/core/block_pool.py``, ``kv_cache_manager.py``): free blocks form one queue; blocks
are taken from its head; freed ones go to its tail, a request's last block first, but a block that is not full, and so
cannot be hit, goes to the head; a full one keeps its content, and can be hit, until it is taken for something else.

Which physical block a request gets never matters, only *whose content* is lost when a block is taken. So the queue is
kept run-length encoded: one entry per freed stretch, not per block, and a request costs O(1) whatever its length.
A stretch is freed tail first and therefore lost tail first, so what is left of it is always a prefix.
"""

from collections import deque


class PrefixGroup:
    """Prompts that begin with the same tokens, and the blocks of that beginning.

    Attributes:
        blocks: whole blocks that the shared tokens fill.
        cached: leading blocks whose content can be found now, in use or free.
        in_use: leading blocks that some request holds (``<= cached``).
    """

    __slots__ = ("_depths", "_stretches", "blocks", "cached", "in_use")

    def __init__(self, shared_tokens: int, block_size: int):
        self.blocks = shared_tokens // block_size
        self.cached = 0
        self.in_use = 0
        self._depths: dict[int, int] = {}  # depth -> number of requests that hold exactly that many blocks
        self._stretches: deque[Stretch] = deque()  # free ones, in queue order: higher blocks first

    def hold(self, depth: int) -> None:
        """Count one more request that holds the first ``depth`` blocks."""
        if depth:
            self._depths[depth] = self._depths.get(depth, 0) + 1
            self.in_use = max(self.in_use, depth)

    def deepen(self, depth: int, new_depth: int) -> None:
        """Let one request that holds ``depth`` blocks hold ``new_depth``, the further ones written by itself."""
        self.cached = new_depth
        self._drop(depth)
        self.hold(new_depth)

    def _drop(self, depth: int) -> None:
        if depth:
            left = self._depths[depth] - 1
            if left:
                self._depths[depth] = left
            else:
                del self._depths[depth]

    def lose(self, blocks: int, stretch: "Stretch") -> None:
        """Note that the highest findable blocks, those at the head of the free queue, were taken."""
        self.cached -= blocks
        if not stretch.count and self._stretches and self._stretches[0] is stretch:
            self._stretches.popleft()

    def release(self, depth: int) -> int:
        """Let go of one request's blocks; return how many thereby become free."""
        self._drop(depth)
        before = self.in_use
        self.in_use = max(self._depths, default=0)
        return before - self.in_use


class PreemptedBlocks:
    """The blocks a preempted request left behind; it alone can find them again (``cached`` leading ones)."""

    __slots__ = ("cached",)

    def __init__(self, cached: int):
        self.cached = cached

    def lose(self, blocks: int, stretch: "Stretch") -> None:
        """Note that the last ``blocks`` of them were taken."""
        self.cached -= blocks


class Stretch:
    """Free blocks that were freed together: ``count`` of them, holding content of ``owner`` (None: nothing useful)."""

    __slots__ = ("count", "owner")

    def __init__(self, owner: "PrefixGroup | PreemptedBlocks | None", count: int):
        self.owner = owner
        self.count = count


class KvCache:
    """The block pool of one engine.

    Attributes:
        num_blocks: usable blocks.
        free: blocks nobody holds now, those with findable content included.
    """

    __slots__ = ("_queue", "block_size", "free", "num_blocks")

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = num_blocks
        # Empty while no free block holds findable content: then only the count matters.
        self._queue: deque[Stretch] = deque()

    def take(self, blocks: int) -> None:
        """Take blocks from the head of the free queue; what they held can no longer be found."""
        self.free -= blocks
        queue = self._queue
        while blocks and queue:
            head = queue[0]
            lost = min(blocks, head.count)
            blocks -= lost
            head.count -= lost
            if head.owner is not None:
                head.owner.lose(lost, head)
            if not head.count:
                queue.popleft()

    def give_back(self, full_blocks: int, unfilled_blocks: int, left_behind: PreemptedBlocks | None = None) -> None:
        """Free blocks that one request alone held: full ones to the tail of the queue, unfilled ones to its head."""
        queue = self._queue
        if left_behind is not None or queue:
            self._append(left_behind, full_blocks)
            if queue[0].owner is None:
                queue[0].count += unfilled_blocks
            else:
                queue.appendleft(Stretch(None, unfilled_blocks))
        self.free += full_blocks + unfilled_blocks

    def give_back_shared(self, group: PrefixGroup, depth: int) -> None:
        """Free one request's hold on the first ``depth`` blocks of a group."""
        freed = group.release(depth)
        if freed:
            group._stretches.append(self._append(group, freed))
            self.free += freed

    def _append(self, owner: PrefixGroup | PreemptedBlocks | None, blocks: int) -> Stretch:
        queue = self._queue
        if not queue and self.free:
            queue.append(Stretch(None, self.free))
        if queue and owner is None and queue[-1].owner is None:
            queue[-1].count += blocks
            return queue[-1]
        stretch = Stretch(owner, blocks)
        queue.append(stretch)
        return stretch

    def free_among(self, group: PrefixGroup, depth: int) -> int:
        """How many of a group's first ``depth`` blocks lie in the free queue."""
        return max(0, depth - group.in_use)

    def hold_shared(self, group: PrefixGroup, depth: int) -> None:
        """Hold the first ``depth`` (all findable) blocks of a group, pulling free ones out of the queue."""
        wanted = self.free_among(group, depth)
        self.free -= wanted
        while wanted:
            stretch = group._stretches[-1]  # the lowest blocks were freed last
            pulled = min(wanted, stretch.count)
            stretch.count -= pulled
            wanted -= pulled
            if not stretch.count:
                group._stretches.pop()
        group.hold(depth)

    def reclaim(self, left_behind: PreemptedBlocks, blocks: int) -> None:
        """Hold again the first ``blocks`` of what a preempted request left; the rest can no longer be found."""
        self.free -= blocks
        for stretch in reversed(self._queue):
            if stretch.owner is left_behind:
                stretch.count -= blocks
                stretch.owner = None
                break
