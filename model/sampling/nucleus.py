"""Draws from nuclei too wide to be sorted out: draw first, ask afterwards whether the id lies in the nucleus.

An id lies in its row's nucleus exactly if what is more probable than it has less mass than the nucleus must hold.
One sum answers that, and most draws pass. After one that does not, only what is more probable than the rejected id
can still lie in the nucleus, so the next draw is made from that: the result follows the nucleus's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.draw import draw, total_mass, uniforms


@dataclass(frozen=True, slots=True)
class WideNuclei:
    """`rows` [W] int64 whose nucleus is not cut out yet, and the mass `target` [W, 1] float64 that it must reach."""

    rows: Tensor
    target: Tensor

    def settle(self, probs: Tensor, token_ids: Tensor, states: Tensor, positions: Tensor, scratch: Tensor) -> None:
        """Redraw, in `token_ids` [R], what was drawn outside a nucleus; on the CPU only, since the host looks.

        `probs` [R, N] is what the ids were drawn from; `states` and `positions` [R] are those of the rows;
        `scratch` [R, N] is overwritten. Each row redraws from its own stream as often as it must.
        """
        rows, target, attempt = self.rows, self.target, 0
        weights = probs.index_select(0, rows)
        while True:
            picked = weights.gather(1, token_ids.index_select(0, rows)[:, None])
            above = torch.gt(weights, picked, out=scratch[: rows.shape[0]]).mul_(weights)
            outside = (total_mass(above)[:, None] >= target).squeeze(1).nonzero().squeeze(1)
            if not outside.numel():
                return
            attempt += 1
            rows, target, weights = rows[outside], target[outside], above[outside]
            uniform = uniforms(states.index_select(0, rows), positions.index_select(0, rows), attempt)
            token_ids.index_copy_(0, rows, draw(weights, uniform))
