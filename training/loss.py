"""Cross-entropy of next tokens in bounded memory: float32 over logits that are made chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.data.examples import IGNORED

# Logits that may exist at once on the CPU. 2^26 float32 values are 256 MiB; the backward pass needs about three times
# that.
MAX_LOGITS = 1 << 26
# A GPU gives a quarter of its memory to logits, their float32 copy and their gradient, 12 bytes each in all: chunks of
# few rows would leave it idle, and each is computed twice.
_GPU_BYTES_PER_LOGIT = 4 * 12
# Products of whole tiles of rows are the fast ones.
_ROWS = 128


def max_logits(device: torch.device) -> int:
    """Logits that may exist at once on the device."""
    if device.type != "cuda":
        return MAX_LOGITS
    return int(torch.cuda.get_device_properties(device).total_memory // _GPU_BYTES_PER_LOGIT)


def summed_cross_entropy(
    compute_logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    limit: int | None = None,
) -> Tensor:
    """Sum of -log p(target) in nats, a float32 scalar, for hidden [..., D] and targets [...]; IGNORED ones add nothing.

    With `label_smoothing` e the target is 1 - e of itself and e spread evenly over all tokens (Szegedy et al. 2016).
    `z_loss` adds that multiple of log² Σ exp(logits) for each target, which keeps logits small (Chowdhery et al. 2022).
    Where there would be more than `limit` logits (default: MAX_LOGITS), each chunk's logits are made anew in the
    backward pass (one more head product) instead of being kept.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    rows = max(1, (MAX_LOGITS if limit is None else limit) // vocab_size)
    rows = rows // _ROWS * _ROWS or rows
    if len(targets) <= rows:
        return _chunk_loss(compute_logits, hidden, targets, label_smoothing, z_loss)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(
                _chunk_loss, compute_logits, *chunk, label_smoothing, z_loss, use_reentrant=False
            )
        else:
            total = total + _chunk_loss(compute_logits, *chunk, label_smoothing, z_loss)
    return total


def _chunk_loss(
    compute_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    logits = compute_logits(hidden).float()
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(targets == IGNORED, 0.0).sum()
    return loss
