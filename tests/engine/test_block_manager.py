"""BlockManager: reference counts, prefix reuse against a naive oracle, eviction order, forced hash collisions."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling_params import SamplingParams
from server.engine import block_manager as block_manager_module
from server.engine.block_manager import BlockConfigError, BlockManager
from server.engine.sequence import Sequence

_ids = itertools.count()


def make(tokens: list[int]) -> Sequence:
    return Sequence(next(_ids), tokens, SamplingParams(), (), 10_000, 0.0, None)


def compute(manager: BlockManager, seq: Sequence) -> None:
    """What a step does to a sequence once all its tokens are computed."""
    seq.num_computed_tokens = seq.num_tokens
    manager.mark_computed(seq)


def serve(manager: BlockManager, tokens: list[int]) -> Sequence:
    """Admit, compute and free; the sequence keeps what the admission found."""
    seq = make(tokens)
    assert manager.admit(seq)
    compute(manager, seq)
    manager.free(seq)
    return seq


def test_blocks_cover_all_tokens_and_come_back() -> None:
    manager = BlockManager(num_blocks=8, block_size=4)
    seq = make(list(range(9)))
    assert manager.admit(seq)
    assert len(set(seq.block_table)) == 3
    assert manager.num_free_blocks == 5
    assert manager.usage == pytest.approx(3 / 8)
    manager.free(seq)
    manager.free(seq)
    assert seq.block_table == []
    assert manager.num_free_blocks == 8
    assert manager.usage == 0.0


def test_admit_refuses_without_side_effects() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    serve(manager, [1, 2, 3, 4])
    seq = make([1, 2, 3, 4, 5, 6, 7])
    assert not manager.admit(seq, reserve=1)
    assert (seq.block_table, seq.num_computed_tokens, manager.num_free_blocks) == ([], 0, 4)
    assert manager.prefix_cache_queries == 4
    assert manager.admit(seq, reserve=0)
    assert manager.num_free_blocks == 0


def test_admit_counts_idle_cached_blocks_as_taken() -> None:
    """A cached block that nobody holds is free; using it as a prefix uses a free block up."""
    manager = BlockManager(num_blocks=3, block_size=2)
    serve(manager, [1, 2, 3, 4])
    seq = make([1, 2, 3, 4, 5, 6, 7])
    assert manager.match_prefix(seq) == 4
    assert not manager.admit(seq)
    assert manager.num_free_blocks == 3


def test_allocate_slots_grows_by_need_and_is_idempotent() -> None:
    manager = BlockManager(num_blocks=3, block_size=4)
    seq = make([1, 2, 3])
    assert manager.admit(seq)
    seq.num_computed_tokens = 3
    assert manager.allocate_slots(seq, 1)
    assert len(seq.block_table) == 1
    for _ in range(2):
        assert manager.allocate_slots(seq, 2)
        assert len(seq.block_table) == 2
    assert manager.can_allocate(seq, 9)
    assert not manager.can_allocate(seq, 10)
    assert not manager.allocate_slots(seq, 10)
    assert len(seq.block_table) == 2


def test_nothing_is_shared_before_it_is_computed() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    first = make([1, 2, 3, 4, 5])
    assert manager.admit(first)
    assert manager.match_prefix(make([1, 2, 3, 4, 5])) == 0
    first.num_computed_tokens = 3
    manager.mark_computed(first)
    assert manager.match_prefix(make([1, 2, 3, 4, 5])) == 2
    compute(manager, first)
    second = make([1, 2, 3, 4, 5])
    assert manager.admit(second)
    assert second.cached_tokens == second.num_computed_tokens == 4
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert [manager.ref_count(block) for block in second.block_table] == [2, 2, 1]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8])
def test_at_least_one_token_is_left_to_compute(length: int) -> None:
    manager = BlockManager(num_blocks=16, block_size=2)
    serve(manager, list(range(10)))
    seq = make(list(range(length)))
    assert manager.match_prefix(seq) == (length - 1) // 2 * 2


def test_generated_tokens_are_found_too() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    seq = make([1, 2, 3])
    assert manager.admit(seq)
    seq.token_ids += [7, 8, 9]
    assert manager.allocate_slots(seq, 6)
    compute(manager, seq)
    manager.free(seq)
    assert manager.match_prefix(make([1, 2, 3, 7, 8, 9, 5])) == 6


def test_equal_blocks_after_different_prefixes_are_different() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    serve(manager, [1, 2, 3, 4])
    assert manager.match_prefix(make([5, 6, 3, 4, 0])) == 0
    assert manager.match_prefix(make([3, 4, 0])) == 0


def test_hashes_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = block_manager_module.hash_block

    def counting(parent_hash: bytes, token_ids: tuple[int, ...]) -> bytes:
        calls.append(token_ids)
        return real(parent_hash, token_ids)

    monkeypatch.setattr(block_manager_module, "hash_block", counting)
    manager = BlockManager(num_blocks=4, block_size=2)
    blocker = make([9] * 5)
    assert manager.admit(blocker)
    seq = make([1, 2, 3, 4, 5])
    for _ in range(10):
        assert not manager.admit(seq)
    manager.free(blocker)
    assert manager.admit(seq)
    compute(manager, seq)
    manager.free(seq)
    assert manager.admit(seq)
    assert calls == [(9, 9), (9, 9), (1, 2), (3, 4)]


def test_blocks_without_content_go_first_and_tails_before_heads() -> None:
    manager = BlockManager(num_blocks=6, block_size=2)
    serve(manager, [1, 2, 3, 4])
    serve(manager, [5, 6, 7, 8])
    filler = make([0] * 3)
    assert manager.admit(filler)
    found = [manager.match_prefix(make([*tokens, 0])) for tokens in ([1, 2, 3, 4], [5, 6, 7, 8])]
    assert found == [4, 4]
    grown: list[list[int]] = []
    for _ in range(4):
        assert manager.allocate_slots(filler, len(filler.block_table) * 2 + 1)
        grown.append([manager.match_prefix(make([*t, 0])) for t in ([1, 2, 3, 4], [5, 6, 7, 8])])
    assert grown == [[2, 4], [0, 4], [0, 2], [0, 0]]


def test_a_hit_makes_a_prefix_recent() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    serve(manager, [1, 2, 3])
    serve(manager, [5, 6, 7])
    assert serve(manager, [1, 2, 4]).cached_tokens == 2
    filler = make([0] * 6)
    assert manager.admit(filler)
    assert manager.match_prefix(make([1, 2, 4])) == 2
    assert manager.match_prefix(make([5, 6, 7])) == 0


def test_an_evicted_head_is_found_again_together_with_its_tail() -> None:
    """Two sequences computed one prefix at the same time, and only one copy is cached. When that copy is gone and is
    computed anew, blocks cached after the other copy are of use again."""
    manager = BlockManager(num_blocks=6, block_size=2)
    first, second = make([1, 2, 3]), make([1, 2, 3, 4, 5])
    assert manager.admit(first)
    assert manager.admit(second)
    compute(manager, first)
    compute(manager, second)
    manager.free(first)
    assert manager.is_cached(second.block_table[1])
    assert not manager.is_cached(second.block_table[0])
    filler = make([0] * 6)
    assert manager.admit(filler)
    assert manager.match_prefix(make([1, 2, 3, 4, 5])) == 0
    manager.free(filler)
    assert serve(manager, [1, 2, 9]).cached_tokens == 0
    assert manager.match_prefix(make([1, 2, 3, 4, 5])) == 4


def test_equal_prefixes_share_their_description() -> None:
    """So that comparing two chains ends at their first common node, and a prefix is kept in memory once."""
    manager = BlockManager(num_blocks=16, block_size=2)
    first, second = make([1, 2, 3]), make([1, 2, 3, 4, 5])
    assert manager.admit(first)
    assert manager.admit(second)
    compute(manager, first)
    compute(manager, second)
    assert second.block_contents[0] is first.block_contents[0]
    assert second.block_contents[1].parent is first.block_contents[0]
    third = make([1, 2, 3])
    assert manager.admit(third)
    assert third.block_contents[0] is first.block_contents[0]


def test_prefix_caching_can_be_off() -> None:
    manager = BlockManager(num_blocks=8, block_size=2, prefix_caching=False)
    serve(manager, [1, 2, 3, 4])
    assert manager.match_prefix(make([1, 2, 3, 4, 5])) == 0
    assert manager.num_cached_blocks == 0
    assert manager.num_free_blocks == 8


def test_reset_forgets_free_and_held_blocks() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    serve(manager, [1, 2, 3, 4])
    held = make([5, 6, 7, 8])
    assert manager.admit(held)
    held.num_computed_tokens = 2
    manager.mark_computed(held)
    manager.reset_prefix_cache()
    assert manager.num_cached_blocks == 0
    compute(manager, held)
    assert manager.num_cached_blocks == 0, "what ran before the reset is not cached after it"
    manager.free(held)
    assert manager.num_free_blocks == 8
    serve(manager, [5, 6, 7, 8])
    assert manager.match_prefix(make([5, 6, 7, 8, 9])) == 4


def test_queries_and_hits_count_first_admissions_only() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    serve(manager, [1, 2, 3, 4, 5])
    seq = make([1, 2, 3, 4, 6])
    assert manager.admit(seq)
    assert (manager.prefix_cache_queries, manager.prefix_cache_hits) == (10, 4)
    manager.free(seq)
    seq.num_preemptions = 1
    assert manager.admit(seq)
    assert (manager.prefix_cache_queries, manager.prefix_cache_hits) == (10, 4)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(BlockConfigError, match="num_blocks"):
        BlockManager(num_blocks=0, block_size=4)
    with pytest.raises(BlockConfigError, match="block_size"):
        BlockManager(num_blocks=4, block_size=0)


prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=12)


def naive_cached_tokens(tokens: list[int], seen: list[list[int]], block_size: int) -> int:
    """Longest run of whole blocks of `tokens`, short of all of it, that some earlier list starts with."""
    best = 0
    for length in range(block_size, len(tokens), block_size):
        if any(earlier[:length] == tokens[:length] for earlier in seen if len(earlier) >= length):
            best = length
    return best


@pytest.mark.parametrize("collide", [False, True], ids=["sha256", "weak hash"])
@settings(deadline=None, max_examples=80)
@given(lists=prompts, block_size=st.integers(1, 4))
def test_hits_equal_a_naive_comparison_of_token_lists(collide: bool, lists: list[list[int]], block_size: int) -> None:
    """With room for all, a hit is exactly what comparing lists says. With a hash of two values, hits may be lost but
    never invented."""
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(block_manager_module, "hash_block", lambda parent, tokens: bytes([sum(tokens) % 2]))
        manager = BlockManager(num_blocks=1_000, block_size=block_size)
        seen: list[list[int]] = []
        for tokens in lists:
            found = serve(manager, tokens).cached_tokens
            expected = naive_cached_tokens(tokens, seen, block_size)
            assert found <= expected if collide else found == expected
            seen.append(tokens)
        assert manager.num_free_blocks == 1_000


def test_a_constant_hash_shares_only_equal_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager_module, "hash_block", lambda parent, tokens: b"same")
    manager = BlockManager(num_blocks=16, block_size=2)
    first = make([1, 2, 3, 4])
    assert manager.admit(first)
    compute(manager, first)
    # The cache now knows one block, the second; its tokens must not pass for a first block.
    assert manager.match_prefix(make([3, 4, 0])) == 0
    second = make([5, 6, 7])
    assert manager.admit(second)
    compute(manager, second)
    assert set(first.block_table).isdisjoint(second.block_table)
    assert manager.match_prefix(make([5, 6, 0])) == 2
    assert manager.match_prefix(make([1, 2, 0])) == 0


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 12), block_size=st.integers(1, 3))
def test_random_use_keeps_counts_and_contents(seed: int, num_blocks: int, block_size: int) -> None:
    """Admit, grow, compute and free at random under scarcity; block contents are tracked from outside."""
    rng = random.Random(seed)
    manager = BlockManager(num_blocks, block_size)
    held: list[Sequence] = []
    written: dict[int, list[int]] = {}  # block -> all tokens from the start through its last one
    for _ in range(60):
        choice = rng.random()
        if choice < 0.4:
            seq = make([rng.randrange(2) for _ in range(rng.randrange(1, 3 * block_size + 2))])
            if manager.admit(seq, reserve=rng.randrange(2)):
                for index in range(seq.num_computed_tokens // block_size):
                    end = (index + 1) * block_size
                    assert written[seq.block_table[index]] == seq.token_ids[:end]
                held.append(seq)
        elif held and choice < 0.7:
            seq = rng.choice(held)
            seq.token_ids.append(rng.randrange(2))
            if manager.allocate_slots(seq, seq.num_tokens - seq.num_computed_tokens):
                for position in range(seq.num_computed_tokens, seq.num_tokens):
                    block = seq.block_table[position // block_size]
                    assert manager.ref_count(block) == 1
                    assert not manager.is_cached(block)
                    written[block] = seq.token_ids[: position + 1]
                compute(manager, seq)
            else:
                seq.token_ids.pop()
        elif held:
            manager.free(held.pop(rng.randrange(len(held))))
        tables = [block for seq in held for block in seq.block_table]
        assert all(manager.ref_count(block) == tables.count(block) for block in range(num_blocks))
        assert manager.num_free_blocks == num_blocks - len(set(tables))
