"""Counting blocks in stretches finds, loses and frees exactly what naming every block would."""

from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.engine import Engine, EngineRequest
from sim.fleet import EngineSettings
from sim.kv_cache import KvCache, PreemptedBlocks, PrefixGroup
from tests.naive_engine import NaiveEngine, NaivePool, NaiveRequest
from tests.strategies import engines

random_cases = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


# -------------------------------------------------------------------------------------------------- the pool alone


@dataclass(eq=False)
class Holder:
    """Somebody who holds blocks of both pools: leading ones of a shared prefix, full ones, perhaps one that is not."""

    number: int
    prefix: int
    shared: int  # blocks of its prompt that are the prefix's
    full: int  # further full blocks, its own
    unfilled: int
    left_behind: PreemptedBlocks | None = None
    blocks: list[int] | None = None

    def contents(self) -> list[tuple[str, int, int]]:
        of_prefix = [("shared", self.prefix, block) for block in range(self.shared)]
        return of_prefix + [("own", self.number, block) for block in range(self.full)]


class BothPools:
    """A ``KvCache`` and a naive pool, asked for the same; they must answer alike."""

    def __init__(self, num_blocks: int, prefix_blocks: list[int]):
        self.cache = KvCache(num_blocks, 1)
        self.naive = NaivePool(num_blocks)
        self.groups = [PrefixGroup(blocks, 1) for blocks in prefix_blocks]

    def start(self, holder: Holder) -> bool:
        """Hold what can be found and take the rest; False when it does not fit."""
        group, cache = self.groups[holder.prefix], self.cache
        depth = min(group.cached, holder.shared)
        own = holder.left_behind.cached if holder.left_behind is not None and depth == holder.shared else 0
        found = self.naive.find(holder.contents())
        assert len(found) == depth + own
        assert self.naive.free_among(found) == cache.free_among(group, depth) + own
        new = holder.shared + holder.full + holder.unfilled - len(found)
        if new + self.naive.free_among(found) > self.naive.free:
            return False
        cache.hold_shared(group, depth)
        if holder.left_behind is not None and own:
            cache.reclaim(holder.left_behind, own)
        holder.left_behind = None
        cache.take(new)
        if depth < holder.shared:
            group.deepen(depth, holder.shared)
        self.naive.hold(found)
        holder.blocks = found + self.naive.take(new)
        for block, content in zip(holder.blocks, holder.contents(), strict=False):
            self.naive.store(block, content)
        return True

    def stop(self, holder: Holder, *, preempted: bool) -> None:
        if preempted and holder.full:
            holder.left_behind = PreemptedBlocks(holder.full)
        self.cache.give_back(holder.full, holder.unfilled, holder.left_behind)
        self.cache.give_back_shared(self.groups[holder.prefix], holder.shared)
        assert holder.blocks is not None
        self.naive.release(holder.blocks)


@random_cases
@given(st.data(), st.integers(4, 30), st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_the_pool_finds_and_frees_what_a_queue_of_single_blocks_does(
    data: st.DataObject, num_blocks: int, prefix_blocks: list[int]
) -> None:
    pools = BothPools(num_blocks, prefix_blocks)
    running: list[Holder] = []
    preempted: list[Holder] = []
    for number in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["start", "start", "finish", "preempt", "resume"])):
            case "start":
                prefix = data.draw(st.integers(0, len(prefix_blocks) - 1))
                shared = data.draw(st.integers(0, prefix_blocks[prefix]))
                holder = Holder(number, prefix, shared, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 1)))
                if pools.start(holder):
                    running.append(holder)
            case "resume" if preempted:
                if pools.start(preempted[-1]):
                    running.append(preempted.pop())
            case "finish" if running:
                pools.stop(running.pop(data.draw(st.integers(0, len(running) - 1))), preempted=False)
            case "preempt" if running:
                preempted.append(running.pop())
                pools.stop(preempted[-1], preempted=True)
            case _:
                pass
        assert pools.cache.free == pools.naive.free
    for holder in running:
        pools.stop(holder, preempted=False)
    assert pools.cache.free == num_blocks


def test_what_was_freed_first_is_lost_first_and_its_end_before_its_beginning() -> None:
    pools = BothPools(10, [4, 4])
    older, newer = Holder(0, 0, 4, 0, 0), Holder(1, 1, 4, 0, 0)
    for holder in (older, newer):
        assert pools.start(holder)
    for holder in (older, newer):
        pools.stop(holder, preempted=False)
    assert pools.start(Holder(2, 0, 0, 5, 0))  # two never used, three of the older prefix
    assert [group.cached for group in pools.groups] == [1, 4]


# --------------------------------------------------------------------------------------------------- in the engine


@st.composite
def arrivals(draw: st.DrawFn, settings: EngineSettings) -> list[tuple[int, NaiveRequest]]:
    """Requests that fit alone, and the iterations they come in.

    No prompt ends with a whole block of its prefix: that block is computed again though it can be found, and the two
    engines treat the second copy differently (see the last test).
    """
    prefix_tokens = draw(st.lists(st.sampled_from([0, 5, 16, 40]), min_size=1, max_size=2))
    requests = []
    for number in range(draw(st.integers(1, 25))):
        prefix = draw(st.integers(0, len(prefix_tokens) - 1))
        prompt_tokens = draw(st.integers(1, 50) | st.just(prefix_tokens[prefix] + 1))
        if prompt_tokens <= prefix_tokens[prefix] and prompt_tokens % settings.block_size == 0:
            prompt_tokens = prefix_tokens[prefix] + 1
        request = NaiveRequest(
            number=number,
            prompt_tokens=prompt_tokens,
            output_tokens=draw(st.integers(1, settings.max_model_len - prompt_tokens)),
            prefix=prefix,
            prefix_tokens=prefix_tokens[prefix],
        )
        requests.append((draw(st.integers(0, 60)), request))
    return sorted(requests, key=lambda arrival: arrival[0])


def assert_engines_agree(settings: EngineSettings, requests: list[tuple[int, NaiveRequest]], *, runs: bool) -> None:
    """Let both engines serve the same requests; where ``runs``, one of them in whole runs of iterations."""
    engine: Engine[EngineRequest] = Engine(settings)
    naive = NaiveEngine(settings)
    groups = {r.prefix: PrefixGroup(r.prefix_tokens, settings.block_size) for _, r in requests}
    fast = {
        r.number: EngineRequest(r.prompt_tokens, r.output_tokens, groups[r.prefix] if r.prefix_tokens else None)
        for _, r in requests
    }
    number_of = {request: number for number, request in fast.items()}
    pending = deque(requests)
    while True:
        batch, expected = engine.schedule(), naive.schedule()
        assert engine.kv.free == naive.pool.free
        if batch is None:
            assert expected is None
            if not pending:
                break
            _, request = pending.popleft()
            engine.add(fast[request.number])
            naive.waiting.append(request)
            continue
        scheduled = {number_of[r]: 1 for r in engine.decoding(batch.iteration)}
        scheduled |= {number_of[r]: tokens for r, tokens in batch.chunks}
        assert (scheduled, [number_of[r] for r in batch.preempted]) == expected
        assert len(engine.running) <= settings.max_num_seqs
        assert sum(scheduled.values()) <= settings.max_num_batched_tokens
        length = engine.run_length() if runs else 1
        if pending:
            length = max(1, min(length, pending[0][0] - engine.iteration + 1))
        engine.finish_run(length)
        for _ in range(length - 1):
            assert naive.schedule() == expected
        while pending and pending[0][0] <= engine.iteration:
            arrival, request = pending.popleft()
            engine.add(fast[request.number], arrival)
            naive.arriving.append((arrival, request))
    assert engine.kv.free == settings.num_kv_blocks
    for _, request in requests:
        assert request.done
        assert fast[request.number].cached_prompt_tokens == request.cached_prompt_tokens


@pytest.mark.parametrize("runs", [False, True], ids=["step by step", "in runs"])
@random_cases
@given(data=st.data(), settings=engines())
def test_every_iteration_of_the_engine_is_the_naive_ones(
    data: st.DataObject, settings: EngineSettings, runs: bool
) -> None:
    assert_engines_agree(settings, data.draw(arrivals(settings)), runs=runs)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("prompt_tokens", [1, 3, 4, 7, 8, 12])
def test_a_prompt_that_is_nothing_but_the_shared_prefix_computes_its_last_block_again(
    prompt_tokens: int, async_scheduling: bool
) -> None:
    settings = replace(SMALL_POOL, async_scheduling=async_scheduling)
    requests = [
        (12 * i, NaiveRequest(number=i, prompt_tokens=prompt_tokens, output_tokens=10, prefix_tokens=12))
        for i in range(5)
    ]
    assert_engines_agree(settings, requests, runs=True)
    assert [request.cached_prompt_tokens for _, request in requests] == [0] + [(prompt_tokens - 1) // 4 * 4] * 4


SMALL_POOL = EngineSettings(
    max_num_seqs=16,
    max_num_batched_tokens=64,
    max_model_len=160,
    block_size=4,
    num_kv_blocks=60,
    enable_prefix_caching=True,
    scheduler_reserve_full_isl=False,
    async_scheduling=False,
)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_pool_much_too_small_for_many_alike(async_scheduling: bool) -> None:
    settings = replace(SMALL_POOL, async_scheduling=async_scheduling)
    requests = [
        (3 * i, NaiveRequest(number=i, prompt_tokens=30 + i % 7, output_tokens=60, prefix_tokens=22)) for i in range(40)
    ]
    assert_engines_agree(settings, requests, runs=True)


def test_a_preempted_prompt_that_is_nothing_but_the_shared_prefix_finds_only_what_is_left() -> None:
    settings = replace(SMALL_POOL, block_size=2, num_kv_blocks=7, max_model_len=14)
    requests = [
        (0, NaiveRequest(number=0, prompt_tokens=7, output_tokens=5, prefix_tokens=2)),
        (0, NaiveRequest(number=1, prompt_tokens=2, output_tokens=4, prefix_tokens=2)),
    ]
    assert_engines_agree(settings, requests, runs=False)


def test_a_preempted_prompt_that_is_nothing_but_the_shared_prefix_loses_its_copy_too() -> None:
    settings = replace(SMALL_POOL, block_size=2, num_kv_blocks=5, max_model_len=10, scheduler_reserve_full_isl=True)
    requests = [
        (0, NaiveRequest(number=0, prompt_tokens=2, output_tokens=8, prefix_tokens=2)),
        (0, NaiveRequest(number=1, prompt_tokens=2, output_tokens=4, prefix_tokens=2)),
    ]
    assert_engines_agree(settings, requests, runs=False)
