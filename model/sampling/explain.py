"""What each filter does to the distribution behind one token, shown by running the sampler's own parts one by one.

A stage is the batch of one row whose parameters have the filters up to it and none behind it, so that the last stage is
what the sampler draws from. The edits (logit_bias, penalties, min_tokens) and the temperature move probability; top_k,
top_p and min_p, and at temperature 0 the greedy choice, remove tokens. V is the model's output width, N the padded one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.sampling.draw import argmax, padded_width, probabilities, total_mass
from model.sampling.edits import LogitBias, MinTokens, Penalties
from model.sampling.filters import Filters, largest_threshold
from model.sampling.rows import MIN_TEMPERATURE
from model.sampling.sampler import Sampler, SamplingRow
from model.sampling_params import SamplingParams

Edit = Callable[[], None]


@dataclass(frozen=True, slots=True)
class FilterEffect:
    """What a stage did to the distribution before it.

    `removed_tokens` lost all their probability, `removed_mass` in total. `moved_mass` is the total variation distance
    between the two distributions: what some tokens lost and others gained. `cut` are alternatives that were removed.
    """

    name: str
    removed_tokens: int
    removed_mass: float
    moved_mass: float
    cut: list[int]


@dataclass(frozen=True, slots=True)
class Alternative:
    """`probability` is that of the raw distribution, `final_probability` of the one that is drawn from."""

    token_id: int
    probability: float
    final_probability: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """`drawn_id` is what the seed draws at this place. `alternatives` are the token itself and the most probable ones
    of the raw and of the final distribution, in the order of the raw one; a token that the tokenizer does not know is
    never one. `filters` are those that the parameters use, in the order in which they apply."""

    token_id: int
    drawn_id: int
    alternatives: list[Alternative]
    filters: list[FilterEffect]


@torch.no_grad()
def explain_token(sampler: Sampler, logits: Tensor, row: SamplingRow, token_id: int, num_top: int) -> Explanation:
    """Take apart the draw that follows `row`, whose output token ids are those generated so far.

    `logits` [1, V] of any float type are left as they are; `token_id` is what stands at the place, drawn or not.
    """
    stages = list(_Stages(sampler, logits, row).run())
    raw, final = stages[0][1], stages[-1][1]
    ids = _shown(raw, final, token_id, min(num_top, sampler.valid_vocab_size))
    positions = torch.tensor([len(row.output_token_ids)], device=logits.device)
    drawn = sampler.sample(logits, sampler.build_batch([row]), positions).token_ids
    return Explanation(
        token_id=token_id,
        drawn_id=int(drawn),
        alternatives=[Alternative(each, _at(raw, each), _at(final, each)) for each in ids],
        filters=[_effect(name, before, after, ids) for (_, before), (name, after) in itertools.pairwise(stages)],
    )


class _Stages:
    """The distributions of one row, from the raw one to the one that is drawn from."""

    def __init__(self, sampler: Sampler, logits: Tensor, row: SamplingRow) -> None:
        self._sampler, self._row = sampler, row
        self._valid, self._width = sampler.valid_vocab_size, padded_width(sampler.valid_vocab_size)
        self._device = logits.device
        self._scores = torch.full((1, self._width), -torch.inf, device=logits.device)
        self._scores[:, : self._valid] = logits[:, : self._valid]

    def run(self) -> Iterator[tuple[str, Tensor]]:
        """Names and distributions [1, N]; the first, the raw one, is named so."""
        params = self._row.params
        yield "raw", probabilities(self._scores)
        for name, edit in self._edits():
            edit()
            yield name, probabilities(self._scores)
        if params.is_greedy:
            chosen = argmax(self._scores[:, : self._valid])
            yield "temperature", torch.zeros_like(self._scores).scatter_(1, chosen[:, None], 1.0)
            return
        if params.temperature != 1.0:
            self._scores.div_(max(params.temperature, MIN_TEMPERATURE))
            yield "temperature", probabilities(self._scores)
        yield from self._filters(probabilities(self._scores))

    def _edits(self) -> Iterator[tuple[str, Edit]]:
        params, row, device = self._row.params, self._row, self._device
        sizes = self._valid, self._width, device
        bias = LogitBias.build([params], self._sampler.vocab_size, *sizes)
        if bias is not None:
            yield "logit_bias", lambda: bias.apply(self._scores)
        penalties = Penalties.build([params], [row.prompt_token_ids], [row.output_token_ids], *sizes)
        if penalties is not None:
            yield "penalties", lambda: penalties.apply(self._scores)
        floor = MinTokens.build([params], self._sampler.eos_token_ids, *sizes)
        if floor is not None:
            position = torch.tensor([len(row.output_token_ids)], device=device)
            yield "min_tokens", lambda: floor.apply(self._scores, position)

    def _filters(self, probs: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each of the filters that are on, together with those before it: their thresholds rest on one another."""
        params = self._row.params
        wanted = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
        neutral = SamplingParams()
        used: dict[str, Any] = {}
        for name, value in wanted.items():
            if value == getattr(neutral, name):
                continue
            used[name] = value
            kept = self._filtered(probs, SamplingParams(**used))
            yield name, kept / total_mass(kept)[:, None].to(kept.dtype)

    def _filtered(self, probs: Tensor, params: SamplingParams) -> Tensor:
        filters = Filters.build([params], self._valid, self._device)
        kept, scratch = probs.clone(), torch.empty_like(probs)
        wide = None if filters is None else filters.apply(kept, scratch)
        if wide is not None:  # a nucleus that the sampler draws from without cutting it out
            kept *= kept >= largest_threshold(kept, wide.target, scratch)
        return kept


def _shown(raw: Tensor, final: Tensor, token_id: int, num_top: int) -> list[int]:
    ids = {token_id}
    for probs in (raw, final):
        ids |= {each for each in probs.topk(num_top).indices[0].tolist() if probs[0, each] > 0}
    return sorted(ids, key=lambda each: (-_at(raw, each), each))


def _at(probs: Tensor, token_id: int) -> float:
    """A token that only the model's padding has is never drawn."""
    return float(probs[0, token_id]) if token_id < probs.shape[1] else 0.0


def _effect(name: str, before: Tensor, after: Tensor, shown: Sequence[int]) -> FilterEffect:
    gone = (before > 0) & (after == 0)
    return FilterEffect(
        name=name,
        removed_tokens=int(gone.sum()),
        removed_mass=float((before * gone).sum(dtype=torch.float64)),
        moved_mass=float((before.double() - after.double()).abs().sum() / 2),
        cut=[each for each in shown if each < gone.shape[1] and gone[0, each]],
    )
