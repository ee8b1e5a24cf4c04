"""DrawnTokens: the tokens of the last step, on the device, for a next step that is launched before they are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Of a step's first D input tokens, those that the step before has drawn: where `mask` [D] bool is set, entry
    `rows` [D] int64 of what it drew (elsewhere any number from 0 on)."""

    mask: Tensor
    rows: Tensor


class DrawnTokens:
    """One buffer of ids, -1 where none could be drawn: steps write it in the device's order, each after it was read."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def keep(self, token_ids: Tensor) -> None:
        """Those that a step has drawn [samples]."""
        self.ids[: token_ids.shape[0]].copy_(token_ids)

    def look_up(self, input_ids: Tensor, pending: PendingTokens) -> Tensor:
        """`input_ids` [D] with the pending ones in their places. A token that could not be drawn becomes 0: its
        sequence ends as soon as the host knows, and any id will do until then."""
        known = self.ids.index_select(0, pending.rows).clamp_min_(0)
        return torch.where(pending.mask, known, input_ids)

    def fill_in(self, input_ids: Tensor, pending: PendingTokens) -> None:
        """The same in place, in the first of `input_ids` [N]."""
        first = input_ids[: pending.rows.shape[0]]
        first.copy_(self.look_up(first, pending))
