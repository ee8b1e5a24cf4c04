"""top_k, top_p and min_p as thresholds on the probabilities of one row.

Each filter keeps every probability at or above a value: top_k the k-th largest, top_p the smallest one of the
nucleus (the fewest largest probabilities whose sum reaches top_p of what top_k kept), min_p a share of the largest.
Ties at a threshold are therefore all kept, and the outcome depends neither on a sort's order nor on what the
neighbours asked for. The three combine as their maximum.

On the CPU a nucleus is found among the 256 largest probabilities; where it is wider, `model.sampling.nucleus` draws
from it without a threshold. On CUDA, where a look from the host would cost a wait, it is always bisected.

R is rows, U the rows that use top_k or top_p, N the padded width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.draw import total_mass
from model.sampling.nucleus import WideNuclei
from model.sampling_params import SamplingParams

_NUCLEUS_CANDIDATES = 256
_MAX_SORTED_TOP_K = 1024
_GROUP = 16
_ABOVE_ONE_BITS = 0x3F800001  # the float32 after 1.0; bits of non-negative floats order as the floats do
_BISECTIONS = 30  # 2^30 > _ABOVE_ONE_BITS


@dataclass(frozen=True, slots=True)
class Filters:
    """Filter parameters of R rows as tensors on the device; None for a filter that no row uses.

    `rows` [U] are the rows with top_k or top_p (None: all of them). `top_k_index` [U, 1] int64 is k - 1 and
    `top_p` [U, 1] float64; where a row has the filter off, `top_k_on` or `top_p_on` [U, 1] is False.
    `min_p` [R, 1] float32.
    """

    rows: Tensor | None
    top_k_index: Tensor | None
    top_k_on: Tensor | None
    max_top_k: int
    top_p: Tensor | None
    top_p_on: Tensor | None
    min_p: Tensor | None

    @classmethod
    def build(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters | None:
        """The filters of `params`, or None when no row filters anything."""
        ranked = [row for row, p in enumerate(params) if 0 < p.top_k < vocab_size or p.top_p < 1.0]
        top_k = [p.top_k if p.top_k < vocab_size else 0 for p in (params[row] for row in ranked)]
        top_p = [params[row].top_p for row in ranked]
        min_p = [p.min_p for p in params]
        if not ranked and not any(min_p):
            return None

        def column(values: list[int] | list[float] | list[bool], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        any_k, any_p = any(top_k), any(p < 1.0 for p in top_p)
        return cls(
            rows=None if len(ranked) == len(params) else torch.tensor(ranked, dtype=torch.int64, device=device),
            top_k_index=column([max(k, 1) - 1 for k in top_k], torch.int64) if any_k else None,
            top_k_on=column([k > 0 for k in top_k], torch.bool) if any_k else None,
            max_top_k=max(top_k, default=0),
            top_p=column(top_p, torch.float64) if any_p else None,
            top_p_on=column([p < 1.0 for p in top_p], torch.bool) if any_p else None,
            min_p=column(min_p, torch.float32) if any(min_p) else None,
        )

    def apply(self, probs: Tensor, scratch: Tensor) -> WideNuclei | None:
        """Set what the filters drop from `probs` [R, N] to zero, in place; `scratch` [R, N] is overwritten.

        A row without filters is left as it is, to the bit. Nuclei that are returned are not cut out of their rows:
        what is drawn from those must be settled.
        """
        threshold, wide = self._thresholds(probs, scratch)
        torch.ge(probs, threshold, out=scratch)
        probs.mul_(scratch)
        return wide

    def _thresholds(self, probs: Tensor, scratch: Tensor) -> tuple[Tensor, WideNuclei | None]:
        """The smallest probability that each row keeps [R, 1]; 0 for a row without filters."""
        threshold, wide = probs.new_zeros(probs.shape[0], 1), None
        if self.rows is not None:
            ranked, wide = self._rank_thresholds(probs.index_select(0, self.rows), scratch[: self.rows.shape[0]])
            threshold.index_copy_(0, self.rows, ranked)
            wide = None if wide is None else WideNuclei(self.rows[wide.rows], wide.target)
        elif self.top_k_index is not None or self.top_p is not None:
            threshold, wide = self._rank_thresholds(probs, scratch)
        if self.min_p is not None:
            threshold = torch.maximum(threshold, probs.amax(dim=-1, keepdim=True) * self.min_p)
        return threshold, wide

    def _rank_thresholds(self, probs: Tensor, scratch: Tensor) -> tuple[Tensor, WideNuclei | None]:
        """Thresholds of top_k and top_p for `probs` [U, N] → [U, 1]."""
        sorted_top_k = self.top_k_index is not None and self.max_top_k <= _MAX_SORTED_TOP_K
        width = self.max_top_k if sorted_top_k else 0
        if self.top_p is not None and not probs.is_cuda:
            width = max(width, _NUCLEUS_CANDIDATES)
        candidates = top_values(probs, width) if width else probs[:, :0]

        floor = probs.new_zeros(probs.shape[0], 1)
        if self.top_k_index is not None and self.top_k_on is not None:
            if sorted_top_k:
                kth = candidates.gather(1, self.top_k_index)
            else:
                kth = largest_threshold(probs, (self.top_k_index + 1).double(), scratch, count=True)
            floor = torch.where(self.top_k_on, kth, floor)
        if self.top_p is None or self.top_p_on is None:
            return floor, None
        if self.top_k_index is None:
            kept = total_mass(probs)
        else:
            torch.ge(probs, floor, out=scratch)
            kept = total_mass(scratch.mul_(probs))
        target = kept[:, None] * self.top_p
        if probs.is_cuda:
            nucleus, wide = largest_threshold(probs, target, scratch), None
        else:
            nucleus, wide = _narrow_nuclei(candidates[:, :_NUCLEUS_CANDIDATES], target, self.top_p_on)
        return torch.maximum(floor, torch.where(self.top_p_on, nucleus, 0.0)), wide


def _narrow_nuclei(candidates: Tensor, target: Tensor, top_p_on: Tensor) -> tuple[Tensor, WideNuclei | None]:
    """The smallest probability [U, 1] of nuclei that end among the candidates [U, 256], best first; 0 for wider ones.

    How many candidates are tried is fixed, so that a row goes one way or the other whatever its neighbours need.
    """
    sums = candidates.double().cumsum(dim=-1)
    index = (sums < target).sum(dim=-1, keepdim=True)
    is_wide = (index == candidates.shape[1]) & top_p_on
    nucleus = candidates.gather(1, index.clamp_(max=candidates.shape[1] - 1)).masked_fill_(is_wide, 0.0)
    rows = is_wide.squeeze(1).nonzero().squeeze(1)
    return nucleus, WideNuclei(rows, target[rows]) if rows.numel() else None


def top_values(values: Tensor, k: int) -> Tensor:
    """The k largest values of each row [R, N], best first [R, k]; N is a multiple of 16.

    On the CPU `topk` over the whole width is slow. The k largest lie in at most k of the strided groups of 16,
    those with the largest maxima, so `topk` runs over the maxima and over those groups' members instead.
    """
    rows, width = values.shape
    groups = values.view(rows, _GROUP, width // _GROUP)
    if values.is_cuda or 2 * k > groups.shape[-1]:
        return values.topk(k, dim=-1).values
    best = groups.amax(dim=1).topk(k, dim=-1, sorted=False).indices
    members = groups.gather(2, best[:, None, :].expand(rows, _GROUP, k))
    return members.reshape(rows, -1).topk(k, dim=-1).values


def largest_threshold(probs: Tensor, target: Tensor, scratch: Tensor, *, count: bool = False) -> Tensor:
    """The largest t of each row such that what is >= t has at least `target` [R, 1] of mass (or of members).

    Bisection over the bits of float32, without a sort and without a look from the host: `probs` [R, N] lie in
    [0, 1], and the answer [R, 1] is one of them. `scratch` [R, N] is overwritten.
    """
    low = torch.zeros(probs.shape[0], 1, dtype=torch.int32, device=probs.device)
    high = torch.full_like(low, _ABOVE_ONE_BITS)
    for _ in range(_BISECTIONS):
        middle = (low + high) >> 1
        torch.ge(probs, middle.view(torch.float32), out=scratch)
        if not count:
            scratch.mul_(probs)
        enough = total_mass(scratch)[:, None] >= target
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return low.view(torch.float32)
