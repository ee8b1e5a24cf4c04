"""AllowedTokens: the tokens that rows may draw, which change from step to step. R rows of the batch have a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """`bits` [R, W] int32, in whose words, the lowest bit first, token i is bit i; `rows` [R] int64, the rows of the
    batch that have a mask (None: all of them, in their order). Every mask allows a token at least."""

    bits: Tensor
    rows: Tensor | None

    def apply(self, scores: Tensor) -> None:
        """Set the scores [B, V] of tokens that are not allowed to minus infinity, in place."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        bits = (self.bits.view(torch.uint8)[:, :, None] >> shifts).bitwise_and_(1)
        barred = bits.flatten(1)[:, : scores.shape[1]] == 0
        if barred.shape[1] < scores.shape[1]:
            barred = torch.nn.functional.pad(barred, (0, scores.shape[1] - barred.shape[1]), value=True)
        if self.rows is None:
            scores.masked_fill_(barred, -torch.inf)
        else:
            masked = scores.index_select(0, self.rows).masked_fill_(barred, -torch.inf)
            scores.index_copy_(0, self.rows, masked)
