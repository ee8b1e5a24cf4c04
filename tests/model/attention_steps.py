"""Models that are nothing but heads, random steps for them, and parts of steps."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from model.attention_check import PagedStep
from model.config import ModelConfig, llama_config
from model.paged_attention import AttentionMetadata


def head_config(heads: int, kv_heads: int, head_dim: int, window: int | None = None) -> ModelConfig:
    config = llama_config(1, heads, kv_heads, heads * head_dim, 64, vocab_size=50, max_seq_len=512)
    return replace(config, head_dim=head_dim, sliding_window=window)


def random_steps(seed: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """(query tokens, context) of each sequence, for each kind of step that the engine runs."""
    rng = random.Random(seed)
    contexts = [rng.randrange(1, 1200) for _ in range(9)]
    chunks = [(rng.randrange(2, context + 1), context) for context in contexts if context > 1]
    decodes = [(1, context) for context in contexts]
    return {
        "prefill": tuple((context, context) for context in contexts[:4]),
        "chunks": tuple(chunks),
        "decode": tuple(decodes),
        "mixed": tuple(rng.sample(decodes + chunks, len(decodes + chunks))),
        "filled up": (*decodes[:3], (1, 0), (1, 0)),
    }


def last_tokens(whole: PagedStep, length: int, count: int) -> PagedStep:
    """The step of the first sequence's last `count` tokens alone."""
    rows, full = slice(length - count, length), whole.metadata
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=full.context_lens.device),
        context_lens=full.context_lens[:1],
        block_tables=full.block_tables[:1],
        slot_mapping=full.slot_mapping[rows],
        num_tokens=count,
        max_query_len=count,
        max_context_len=length,
    )
    return PagedStep(whole.q[rows], whole.k[rows], whole.v[rows], whole.key_cache, whole.value_cache, metadata)
