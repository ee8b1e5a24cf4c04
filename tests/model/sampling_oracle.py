"""What a draw must give, in float64 and by the definitions; and mixtures of parameters to ask it about."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.draw import seed_state, uniforms
from model.sampling_params import SamplingParams

# What float32 weights may move a share of the mass, or a weight against another.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class ExactDraw:
    """`low` and `high` [V] float64 are where an id's share of the mass begins and ends; `uniform` is what was drawn.

    With `is_close`, a filter's cut lies so near to another that float32 may choose that one.
    """

    token_id: int
    low: Tensor
    high: Tensor
    uniform: float
    is_close: bool

    def allows(self, token_id: int) -> bool:
        """Whether the id is the right one up to the tolerance: kept, and the uniform inside its share or next to it."""
        low, high = float(self.low[token_id]), float(self.high[token_id])
        return high > low and low - TOLERANCE <= self.uniform <= high + TOLERANCE

    @property
    def margin(self) -> float:
        """How far, as a share of the mass, the uniform is from where another id's share begins."""
        edges = torch.cat((self.low[self.token_id, None], self.high[self.token_id, None]))
        return float((edges - self.uniform).abs().min())


def exact_draw(logits: Tensor, params: SamplingParams, position: int) -> ExactDraw:
    """Of `logits` [V], for a row that is not greedy. Ties at a threshold are kept."""
    weights = ((logits.double() - logits.double().max()) / params.temperature).exp()
    is_close = False
    if 0 < params.top_k < len(weights):
        threshold = weights.topk(params.top_k).values[-1]
        is_close |= _has_neighbour(weights, threshold)
        weights = torch.where(weights >= threshold, weights, 0.0)
    best_floor = params.min_p
    if params.top_p < 1.0:
        ordered = weights.sort(descending=True).values
        sums, target = ordered.cumsum(0), ordered.sum() * params.top_p
        threshold = ordered[int((sums < target).sum())]
        is_close |= bool(((sums - target).abs() < TOLERANCE * sums[-1]).any()) or _has_neighbour(weights, threshold)
        weights = torch.where(weights >= threshold, weights, 0.0)
    if best_floor > 0.0:
        is_close |= _has_neighbour(weights, torch.tensor(best_floor, dtype=torch.float64))
        weights = torch.where(weights >= best_floor, weights, 0.0)
    state, place = torch.tensor([seed_state(params.seed)]), torch.tensor([position])
    uniform, sums = float(uniforms(state, place)), weights.cumsum(0)
    total = float(sums[-1])
    token_id = int((sums <= uniform * total).sum())
    return ExactDraw(token_id, (sums - weights) / total, sums / total, uniform, is_close)


def _has_neighbour(weights: Tensor, threshold: Tensor) -> bool:
    """Whether a weight is so near to the threshold, without being equal, that float32 may not tell them apart."""
    distance = (weights - threshold).abs()
    return bool(((distance > 0) & (distance < TOLERANCE * threshold)).any())


def mixed_params(count: int, seed: int) -> list[SamplingParams]:
    """Of all kinds, greedy ones and filters that drop nothing among them."""
    choose = random.Random(seed)
    return [
        SamplingParams(
            temperature=choose.choice([0.0, 1e-4, 0.3, 0.8, 1.0, 1.0, 2.0]),
            top_k=choose.choice([0, 0, 1, 2, 7, 40, 200, 10**9]),
            top_p=choose.choice([1.0, 1.0, 1e-9, 0.3, 0.8, 0.95, 0.9999]),
            min_p=choose.choice([0.0, 0.0, 0.0, 0.01, 0.3, 1.0]),
            seed=choose.randrange(2**63),
        )
        for _ in range(count)
    ]


def mixed_logits(rows: int, vocab_size: int, seed: int) -> Tensor:
    """[rows, V] float32: flat and peaked rows, rows of a few distinct values, rows with barred ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(rows, vocab_size, generator=generator)
        * torch.tensor([0.1, 1.0, 3.0, 10.0])[torch.arange(rows) % 4, None]
    )
    few = torch.arange(rows) % 5 == 0
    logits[few] = logits[few].round()
    barred = torch.rand(rows, vocab_size, generator=generator) < 0.5
    barred &= (torch.arange(rows) % 7 == 0)[:, None]
    barred[:, vocab_size // 2] = False
    return logits.masked_fill(barred, -torch.inf)


@dataclass(slots=True)
class Comparison:
    """How many draws were compared, how many of them differ by rounding, how many cuts were too close to tell."""

    rows: int = 0
    rounded: int = 0
    close: int = 0

    def add(self, logits: Tensor, params: Sequence[SamplingParams], positions: Tensor, token_ids: Tensor) -> None:
        """Compare `token_ids` [B], drawn from float32 `logits` [B, V], with the exact ones. Raises AssertionError."""
        drawn = zip(logits, params, positions.tolist(), token_ids.tolist(), strict=True)
        for row, (values, row_params, position, token_id) in enumerate(drawn):
            self.rows += 1
            if row_params.is_greedy:
                best = int((values == values.max()).nonzero()[0])
                assert token_id == best, (row, token_id, best)
                continue
            exact = exact_draw(values, row_params, position)
            if exact.is_close:
                self.close += 1
            else:
                assert exact.allows(token_id), (row, row_params, token_id, exact.token_id, exact.margin)
                self.rounded += token_id != exact.token_id
