"""Models that are nothing but heads, and random steps for them."""

from __future__ import annotations

import random
from dataclasses import replace

from model.config import ModelConfig, llama_config


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
