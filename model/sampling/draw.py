"""Draws that depend on one row alone: counter-based uniforms, inverse-CDF draws, greedy picks.

Nothing here looks across rows, and no operation is used whose rounding depends on how many rows there are, so a
sequence gets the same token whoever shares its batch. R and B are rows, N the padded width, V the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Widths are padded to a multiple of this, and a draw looks for the block first, then inside it."""

_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_ATTEMPT_STEP = 0xD1342543DE82EF95
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_LARGEST_BELOW_ONE = 1.0 - 2.0**-53


def padded_width(width: int) -> int:
    """`width` rounded up to whole blocks."""
    return -(-width // BLOCK) * BLOCK


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def seed_state(seed: int) -> int:
    """Start of a seed's stream of uniforms, as a signed 64-bit integer; a bijection, so every seed bit counts."""
    z = (seed + _GAMMA) & _MASK64
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _MASK64
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _MASK64
    return _signed(z ^ (z >> 31))


def uniforms(states: Tensor, positions: Tensor, attempt: int = 0) -> Tensor:
    """One uniform in [0, 1) with 53 random bits per row: a pure function of (state, position, attempt).

    `states` [B] int64 come from `seed_state`, `positions` [B] int64 count the tokens generated so far, and
    `attempt` counts the draws that were rejected at that position.
    The stream is SplitMix64 (Steele, Lea and Flood, 2014), indexed by position instead of stepped.
    """
    z = (positions + 1).mul_(_signed(_GAMMA)).add_(states)
    if attempt:
        z += _signed(attempt * _ATTEMPT_STEP & _MASK64)
    z ^= (z >> 30).bitwise_and_(2**34 - 1)  # >> keeps the sign; the mask makes it a logical shift
    z *= _signed(_MULTIPLIER_1)
    z ^= (z >> 27).bitwise_and_(2**37 - 1)
    z *= _signed(_MULTIPLIER_2)
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return (z >> 11).bitwise_and_(2**53 - 1).to(torch.float64).mul_(2.0**-53)


def probabilities(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """softmax of float32 `scores` [R, N].

    CUDA's sums and scans choose their order by the number of rows. There the probabilities are rounded to
    multiples of 2^-50, which makes every later float64 sum exact and so independent of its order; on the CPU a
    row is summed in one fixed order and nothing need be rounded.
    """
    probs = torch.softmax(scores, dim=-1) if out is None else torch.softmax(scores, dim=-1, out=out)
    if probs.is_cuda:
        probs.mul_(2.0**50).round_().mul_(2.0**-50)
    return probs


def block_sums(values: Tensor) -> Tensor:
    """Running sums over blocks: [R, N] float32 → [R, N / BLOCK] float64, each the mass up to its block's end."""
    blocks = values.view(values.shape[0], -1, BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64) if values.is_cuda else blocks.sum(dim=-1).double()
    return sums.cumsum(dim=-1)


def total_mass(values: Tensor) -> Tensor:
    """Sum of each row [R, N] as float64 [R], in the order of `block_sums` whatever the number of rows."""
    return block_sums(values)[:, -1]


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw in vocabulary order: the first id whose running sum exceeds uniform · total.

    `weights` [R, N] float32, non-negative, need not sum to one; `uniform` [R] float64 in [0, 1). Returns int64 [R].
    An id of weight zero is never returned: its running sum equals its predecessor's. A row of NaN gives id 0.
    """
    if weights.shape[1] == BLOCK:
        return _invert(weights, uniform[:, None])
    bounds = block_sums(weights)
    target = uniform[:, None] * bounds[:, -1:]
    block = (bounds <= target).sum(dim=-1, keepdim=True)
    lower, upper = pad(bounds, (1, 0)).gather(1, torch.cat((block, block + 1), dim=-1)).split(1, dim=-1)
    # How far into its block the target lies, as a share: the block's own sum may differ in the last bits.
    share = ((target - lower) / (upper - lower)).clamp_(0.0, _LARGEST_BELOW_ONE)
    start = block.mul_(BLOCK)
    inside = weights.gather(1, start + torch.arange(BLOCK, device=weights.device))
    return _invert(inside, share).add_(start.squeeze(1))


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw from one block: `weights` [R, BLOCK], `uniform` [R, 1] below 1 → int64 [R]."""
    sums = weights.double().cumsum(dim=-1)
    return (sums <= uniform * sums[:, -1:]).sum(dim=-1)


def argmax(scores: Tensor) -> Tensor:
    """Lowest id of each row's maximum: [B, V] of any float type → int64 [B].

    On the CPU torch's `argmax` is slow against `amax`, most of all in bfloat16: few rows go through numpy, and wide
    batches look for the first best block and then inside it. All ways return the first maximum, or the first NaN.
    """
    rows, width = scores.shape
    whole = width // _ARGMAX_BLOCK
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and rows <= _FEW_ROWS:
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    if scores.is_cuda or rows < 4 or whole < 4:
        return scores.max(dim=-1).indices
    best = scores[:, : whole * _ARGMAX_BLOCK].unflatten(-1, (whole, _ARGMAX_BLOCK)).amax(dim=-1)
    if whole * _ARGMAX_BLOCK < width:
        tail = scores[:, whole * _ARGMAX_BLOCK :].amax(dim=-1, keepdim=True)
        best = torch.cat((best, tail), dim=-1)
    start = best.max(dim=-1, keepdim=True).indices.mul_(_ARGMAX_BLOCK)
    # Past the end the last id repeats, which cannot come before itself.
    ids = (start + torch.arange(_ARGMAX_BLOCK)).clamp_(max=width - 1)
    offset = scores.gather(1, ids).max(dim=-1, keepdim=True).indices
    return ids.gather(1, offset).squeeze(1)


_ARGMAX_BLOCK = 512
_FEW_ROWS = 8
