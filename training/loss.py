"""Cross-entropy of next tokens in bounded memory: float32 over logits that are made chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits that may exist at once. 2^25 float32 values are 128 MiB; the backward pass needs about three times that.
MAX_LOGITS = 1 << 25


def summed_cross_entropy(
    compute_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, vocab_size: int
) -> Tensor:
    """Sum of -log p(target) in nats, a float32 scalar, for hidden [..., D] and targets [...].

    Where all logits would not fit in MAX_LOGITS, each chunk's logits are made anew in the backward pass
    (one more head product) instead of being kept.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    rows = max(1, MAX_LOGITS // vocab_size)
    if len(targets) <= rows:
        return _chunk_loss(compute_logits, hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, compute_logits, part, wanted, use_reentrant=False)
        else:
            total = total + _chunk_loss(compute_logits, part, wanted)
    return total


def _chunk_loss(compute_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(compute_logits(hidden).float(), targets, reduction="sum")
