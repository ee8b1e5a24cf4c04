"""More rows for the vocabulary of weights that are trained already."""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")
# Of the rows' own spread: little beside it, but new tokens must not stay one and the same under weight tying.
_NOISE = 0.01


def resize_vocabulary(state: dict[str, Tensor], known: int, rows: int, seed: int) -> dict[str, Tensor]:
    """The state dict with `rows` rows [V, D] of the embedding and of an untied head, of which the first `known` stay.

    The others start at the mean of these, plus a hundredth of their standard deviation in each dimension, which `seed`
    decides. At the mean of the head's rows a token's logit is the mean of all logits, so its probability is at most
    1/(known + 1) and the model goes on saying what it said; from random rows it might not (John Hewitt, "Initializing
    New Word Embeddings for Pretrained Language Models", 2021).
    """
    generator = torch.Generator().manual_seed(seed)
    resized = {name: _resize(state[name], known, rows, generator) for name in VOCABULARY_WEIGHTS if name in state}
    return state | resized


def _resize(weight: Tensor, known: int, rows: int, generator: torch.Generator) -> Tensor:
    kept = weight[:known]
    if rows <= known:
        return kept[:rows]
    spread, mean = torch.std_mean(kept.double(), dim=0, correction=0)
    noise = torch.randn(rows - known, weight.shape[1], generator=generator, dtype=torch.float64)
    added = mean + _NOISE * spread * noise
    return torch.cat([kept, added.to(weight.dtype)])
