"""BlockManager: who holds which KV block, and which blocks already hold a prefix that a new sequence can reuse.

Free of torch: a block is a number. Every operation on a block is O(1).
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter, OrderedDict

from model.errors import QuillError
from server.engine.sequence import Sequence

_NEVER = sys.maxsize
_NO_EPOCH = -1


class BlockConfigError(QuillError):
    """A KV cache size that cannot be run."""


def hash_block(parent_hash: bytes, token_ids: tuple[int, ...]) -> bytes:
    """SHA-256 over the hash of the preceding block (the root's for the first) and this block's tokens."""
    return hashlib.sha256(parent_hash + array("q", token_ids).tobytes()).digest()


def root_hash(generation: int) -> bytes:
    """What stands for the block before a sequence's first: equal tokens give other keys and values on other weights."""
    return b"" if generation == 0 else generation.to_bytes(8, "little")


class BlockContent:
    """What a full block holds: its tokens and, through `parent`, every token before them, computed by the weights of
    that `generation`.

    The hash only finds a candidate; `same_prefix` compares tokens, so a collision is never taken for a hit.
    """

    __slots__ = ("generation", "hash", "parent", "token_ids")

    def __init__(self, parent: BlockContent | None, token_ids: tuple[int, ...], generation: int = 0) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.generation = generation
        self.hash: bytes = hash_block(root_hash(generation) if parent is None else parent.hash, token_ids)


def same_prefix(a: BlockContent | None, b: BlockContent | None) -> bool:
    """Whether two chains hold the same tokens. Chains that share a node are compared only down to it."""
    while a is not b:
        if a is None or b is None or a.token_ids != b.token_ids or a.generation != b.generation:
            return False
        a, b = a.parent, b.parent
    return True


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens, with reference counts.

    Sequences of several models, or of a model's old and new weights, share the blocks: each set of weights is a
    generation with a block size of its own, and none finds what another computed. Generation 0 exists from the start.

    With `prefix_caching`, a full block whose KV is computed can be found by its content, also after its last
    owner has freed it: such a block stays until its space is needed. Blocks without reusable content are handed out
    first; after them the least recently freed, and of one sequence the tail before the head, for a block is only
    of use with all blocks before it.

    `queries` and `hits` count, by generation, prompt tokens looked up and found at first admissions.
    Raises BlockConfigError for sizes below 1.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise BlockConfigError("num_blocks must be at least 1: raise kv_cache_memory")
        if block_size < 1:
            raise BlockConfigError("block_size must be at least 1")
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._block_sizes = {0: block_size}
        self._retired: set[int] = set()
        self.queries: Counter[int] = Counter()
        self.hits: Counter[int] = Counter()
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; block 0 comes first
        self._free_cached: OrderedDict[int, None] = OrderedDict()  # least recently freed first
        self._contents: list[BlockContent | None] = [None] * num_blocks  # set while the block is in _cached
        self._cached: dict[bytes, int] = {}
        self._epoch = 0

    @property
    def prefix_cache_queries(self) -> int:
        return self.queries.total()

    @property
    def prefix_cache_hits(self) -> int:
        return self.hits.total()

    @property
    def block_size(self) -> int:
        """Tokens in a block of the first generation."""
        return self._block_sizes[0]

    def block_size_of(self, generation: int) -> int:
        return self._block_sizes[generation]

    def add_generation(self, generation: int, block_size: int) -> None:
        """Let sequences of another set of weights use the blocks, `block_size` tokens in each."""
        assert generation not in self._block_sizes, "a generation is added once"
        self._block_sizes[generation] = block_size

    def retire_generation(self, generation: int) -> None:
        """Forget what a generation's blocks hold. Its sequences keep theirs to the end, but find and leave nothing."""
        self._retired.add(generation)
        for block in [block for block in self._cached.values() if self._generation_in(block) == generation]:
            self._forget(block)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, with or without reusable content."""
        return len(self._free) + len(self._free_cached)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks

    def ref_count(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block]

    def is_cached(self, block: int) -> bool:
        """Whether the block can be found by its content, and so must not be written."""
        return self._contents[block] is not None

    def num_blocks_for(self, num_tokens: int, generation: int = 0) -> int:
        return -(-num_tokens // self._block_sizes[generation])

    def match_prefix(self, seq: Sequence) -> int:
        """How many leading tokens of `seq` the cache would serve now: whole blocks, and never all tokens."""
        return len(self._match(seq)) * self._block_sizes[seq.generation]

    def admit(self, seq: Sequence, reserve: int = 0) -> bool:
        """Give a sequence without blocks what all its tokens need, reusing cached blocks, and set
        `num_computed_tokens` to the tokens these serve.

        Returns False, changing nothing, if fewer than `reserve` blocks would be left free.
        """
        assert not seq.block_table, "admit() is for sequences without blocks"
        matched = self._match(seq)
        num_new = self.num_blocks_for(seq.num_tokens, seq.generation) - len(matched)
        num_idle = sum(not self._ref_counts[block] for block in matched)
        if num_new + num_idle + reserve > self.num_free_blocks:
            return False
        for block in matched:
            self._acquire(block)
        seq.block_table.extend(matched)
        seq.block_table.extend(self._take_free() for _ in range(num_new))
        self._start(seq, len(matched))
        return True

    def can_allocate(self, seq: Sequence, num_new_tokens: int) -> bool:
        """Whether `allocate_slots` would succeed."""
        return self._num_missing(seq, num_new_tokens) <= self.num_free_blocks

    def allocate_slots(self, seq: Sequence, num_new_tokens: int) -> bool:
        """Make room in `block_table` for `num_new_tokens` after the computed ones.

        Returns False, changing nothing, if too few blocks are free. Calling it again changes nothing.
        """
        missing = self._num_missing(seq, num_new_tokens)
        if missing > self.num_free_blocks:
            return False
        for _ in range(missing):
            seq.block_table.append(self._take_free())
        return True

    def blocks_in_progress(self, seq: Sequence) -> list[bytes]:
        """Hashes of the blocks that will be full, and cached, once the sequence's scheduled tokens are computed."""
        if not self._leaves_content(seq):
            return []
        size = self._block_sizes[seq.generation]
        start = seq.num_computed_tokens // size
        end = (seq.num_computed_tokens + seq.num_scheduled_tokens) // size
        self._describe(seq, end)
        return [content.hash for content in seq.block_contents[start:end]]

    def look_ahead(self, seq: Sequence, in_progress: set[bytes]) -> tuple[int, int]:
        """How many leading tokens the cache serves now, and how many right after them others are computing."""
        start, size = len(self._match(seq)), self._block_sizes[seq.generation]
        num_full = seq.num_reusable_tokens // size
        end = start
        while end < num_full and seq.block_contents[end].hash in in_progress:
            end += 1
        return start * size, (end - start) * size

    def mark_computed(self, seq: Sequence) -> None:
        """Enter into the cache the full blocks of known tokens that `num_computed_tokens` covers: call it once the step
        that writes their KV is with the device, which runs later steps after it."""
        if not self._leaves_content(seq):
            seq.next_cache_boundary = _NEVER
            return
        size = self._block_sizes[seq.generation]
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // size
        self._describe(seq, num_full)
        for index in range(seq.num_cached_blocks, num_full):
            self._register(seq, index)
        seq.num_cached_blocks = num_full
        seq.next_cache_boundary = (num_full + 1) * size

    def free(self, seq: Sequence) -> None:
        """Drop the sequence's references; harmless when it has none."""
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                if self._contents[block] is None:
                    self._free.append(block)
                else:
                    self._free_cached[block] = None
        seq.block_table.clear()

    def reset_prefix_cache(self) -> None:
        """Forget all cached content, as a change of weights requires. Sequences that hold blocks keep them, but
        what they compute is no longer cached."""
        for block in self._cached.values():
            self._contents[block] = None
        self._cached.clear()
        self._free.extend(self._free_cached)
        self._free_cached.clear()
        self._epoch += 1

    def _num_missing(self, seq: Sequence, num_new_tokens: int) -> int:
        needed = self.num_blocks_for(seq.num_computed_tokens + num_new_tokens, seq.generation)
        return max(0, needed - len(seq.block_table))

    def _leaves_content(self, seq: Sequence) -> bool:
        """Whether what the sequence computes is for others to find."""
        return self.prefix_caching and seq.cache_epoch == self._epoch and seq.generation not in self._retired

    def _generation_in(self, block: int) -> int:
        content = self._contents[block]
        assert content is not None
        return content.generation

    def _describe(self, seq: Sequence, num_full: int) -> None:
        """Compute the contents of the first `num_full` blocks that are not known yet."""
        contents, size = seq.block_contents, self._block_sizes[seq.generation]
        for start in range(len(contents) * size, num_full * size, size):
            parent = contents[-1] if contents else None
            contents.append(BlockContent(parent, tuple(seq.token_ids[start : start + size]), seq.generation))

    def _match(self, seq: Sequence) -> list[int]:
        """The cached blocks that hold a prefix of the sequence, as far as it may be reused."""
        if not self.prefix_caching or seq.generation in self._retired:
            return []
        num_full = seq.num_reusable_tokens // self._block_sizes[seq.generation]
        self._describe(seq, num_full)
        matched: list[int] = []
        parent: BlockContent | None = None
        for wanted in seq.block_contents[:num_full]:
            block = self._cached.get(wanted.hash)
            found = None if block is None else self._contents[block]
            if block is None or found is None or found.token_ids != wanted.token_ids:
                break
            if found.generation != seq.generation or not same_prefix(found.parent, parent):
                break
            matched.append(block)
            parent = found
        return matched

    def _start(self, seq: Sequence, num_matched: int) -> None:
        for index in range(num_matched):  # adopt the shared nodes: later comparisons then end at once
            content = self._contents[seq.block_table[index]]
            assert content is not None
            seq.block_contents[index] = content
        size = self._block_sizes[seq.generation]
        seq.num_computed_tokens = num_matched * size
        seq.num_cached_blocks = num_matched
        seq.next_cache_boundary = (num_matched + 1) * size if self.prefix_caching else _NEVER
        # Texts that are only scored come once: their blocks would push out what others use again.
        seq.cache_epoch = _NO_EPOCH if seq.score_only else self._epoch
        if not seq.num_preemptions:
            seq.cached_tokens = seq.num_computed_tokens
            looked_up = seq.num_prompt_tokens if seq.prompt_score is None else seq.num_reusable_tokens
            self.queries[seq.generation] += looked_up
            self.hits[seq.generation] += seq.cached_tokens

    def _register(self, seq: Sequence, index: int) -> None:
        """Make the sequence's full block `index` findable, unless an equal one already is."""
        content, block = seq.block_contents[index], seq.block_table[index]
        content.parent = seq.block_contents[index - 1] if index else None
        known = self._cached.get(content.hash)
        if known is not None:
            found = self._contents[known]
            assert found is not None
            if same_prefix(found, content):
                seq.block_contents[index] = found
                return
            self._forget(known)
        self._cached[content.hash] = block
        self._contents[block] = content

    def _forget(self, block: int) -> None:
        """Take a block's content out of the cache."""
        content = self._contents[block]
        assert content is not None
        del self._cached[content.hash]
        self._contents[block] = None
        if not self._ref_counts[block]:
            del self._free_cached[block]
            self._free.append(block)

    def _acquire(self, block: int) -> None:
        if not self._ref_counts[block]:
            del self._free_cached[block]
        self._ref_counts[block] += 1

    def _take_free(self) -> int:
        if not self._free:
            self._forget(next(iter(self._free_cached)))
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block
