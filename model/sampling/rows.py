"""RowParameters: what the rows of a batch ask of the sampling kernel, at addresses that can stay fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.draw import seed_state
from model.sampling_params import SamplingParams

MIN_TEMPERATURE = 1e-6  # below it, dividing would overflow float32; the draw is greedy long before

_FIELDS = 5
_WIDE = 2  # the first ones have 64 bits


@dataclass(frozen=True, slots=True)
class RowParameters:
    """One entry a row, [B] each; `packed` [5, C] int64 is the memory that the others are views of, C >= B.

    `states` int64 are those of `seed_state`. `temperature` float32 is 0 for a greedy row, `top_k` int32 is 0, `top_p`
    float64 is 1 and `min_p` float32 is 0 where a filter is off.
    """

    states: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    packed: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device | str) -> RowParameters:
        """`size` greedy rows."""
        rows = cls.over(torch.zeros(_FIELDS, _capacity(size), dtype=torch.int64, device=device), size)
        rows.top_p.fill_(1.0)
        return rows

    @classmethod
    def build(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device | str) -> RowParameters:
        """The rows of `params`, in their order; a top_k of all of `vocab_size` is off. One copy to `device`."""
        size, on_cuda = len(params), torch.device(device).type == "cuda"
        packed = torch.zeros(_FIELDS, _capacity(size), dtype=torch.int64, pin_memory=on_cuda)
        rows = cls.over(packed, size)
        temperatures = [0.0 if p.is_greedy else max(p.temperature, MIN_TEMPERATURE) for p in params]
        rows.states.copy_(torch.tensor([seed_state(p.seed) for p in params], dtype=torch.int64))
        rows.temperature.copy_(torch.tensor(temperatures, dtype=torch.float32))
        rows.top_k.copy_(torch.tensor([p.top_k if p.top_k < vocab_size else 0 for p in params], dtype=torch.int32))
        rows.top_p.copy_(torch.tensor([p.top_p for p in params], dtype=torch.float64))
        rows.min_p.copy_(torch.tensor([p.min_p for p in params], dtype=torch.float32))
        return cls.over(packed.to(device, non_blocking=on_cuda), size)

    def load(self, other: RowParameters) -> None:
        """Copy the rows of `other` over the first rows of this, which must have as many. Two copies."""
        size = len(other.states)
        assert size <= len(self.states)
        for mine, others in zip(self._halves(), other._halves(), strict=True):
            mine[:, :size].copy_(others[:, :size], non_blocking=True)

    def view(self, size: int) -> RowParameters:
        """The first `size` rows: the same memory."""
        return self.over(self.packed, size)

    def _halves(self) -> tuple[Tensor, Tensor]:
        """The fields of 64 bits [2, C] and those of 32 [3, 2C]."""
        return self.packed[:_WIDE], self.packed[_WIDE:].view(torch.int32)

    @classmethod
    def over(cls, packed: Tensor, size: int) -> RowParameters:
        """The first `size` rows that lie in the memory `packed` of another."""
        states, top_p, temperature, top_k, min_p = packed
        return cls(
            states=states[:size],
            temperature=temperature.view(torch.float32)[:size],
            top_k=top_k.view(torch.int32)[:size],
            top_p=top_p.view(torch.float64)[:size],
            min_p=min_p.view(torch.float32)[:size],
            packed=packed,
        )


def _capacity(size: int) -> int:
    """`size` rounded up, so that every field begins at an address of the same alignment, 16 bytes."""
    return max(size + size % 2, 2)
