"""Beam search: the continuations of a prompt that are likely as a whole, rather than token by token.

The N most likely unfinished hypotheses go on side by side; finished ones compete by

    score = sum of log-probabilities / length ** length_penalty

where the length counts generated tokens, the one that ends a hypothesis among them (Wu et al. 2016, in the form that
`transformers` has made usual, and whose choices these are).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.errors import InvalidSamplingParamsError
from model.generate import CausalModel, FinishReason, check_prompt

EarlyStopping = Literal["off", "first", "never"]
MAX_BEAMS = 64


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How to search, and when to stop.

    `length_penalty` above 0 favours long hypotheses, below 0 short ones; 0 compares plain sums.
    `early_stopping`: "first" ends with the first `num_beams` finished hypotheses; "off" when the best unfinished one
    would lose to all finished ones if it ended now; "never" when it would lose at any length that it may yet reach.

    Raises InvalidSamplingParamsError, naming the field, for a value out of its bounds.
    """

    num_beams: int = 4
    max_tokens: int = 128
    min_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "off"
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(1 <= self.num_beams <= MAX_BEAMS, "num_beams", f"must lie between 1 and {MAX_BEAMS}")
        _require(self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must lie between 0 and max_tokens")
        _require(abs(self.length_penalty) <= 10, "length_penalty", "must lie in [-10, 10]")  # NaN is not
        _require(self.early_stopping in ("off", "first", "never"), "early_stopping", "must be off, first or never")


@dataclass(frozen=True, slots=True)
class BeamHypothesis:
    """`token_ids` holds the generated tokens, the one that ended them included; `logprob` is their sum in nats."""

    token_ids: list[int]
    logprob: float
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Hypothesis `beam` of the running ones, one token longer."""

    beam: int
    token_id: int
    logprob: float


@torch.no_grad()
def beam_search(
    model: CausalModel,
    prompt_token_ids: Sequence[int],
    params: BeamParams,
    *,
    eos_token_ids: Sequence[int] | None = None,
    valid_vocab_size: int | None = None,
) -> list[BeamHypothesis]:
    """The best finished continuations, best first: `params.num_beams` of them, fewer from a tiny vocabulary.

    `eos_token_ids` defaults to the config's; ids from `valid_vocab_size` on are never taken. A hypothesis that
    reaches max_tokens or the end of the context is finished. Raises PromptError as `stream_generate` does.
    """
    check_prompt(prompt_token_ids, model.config)
    eos = model.config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
    ends = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos)})
    limit = min(params.max_tokens, model.config.max_seq_len - len(prompt_token_ids))
    beams = _Beams(params, ends, limit)
    cache = model.new_dense_cache(batch_size=1, max_len=len(prompt_token_ids) + limit)
    input_ids = torch.tensor([list(prompt_token_ids)], device=model.device)
    while True:
        logits = model.compute_logits(model(input_ids, cache)[:, -1])[:, :valid_vocab_size]
        survivors = beams.advance(logits.float().log_softmax(-1))
        if beams.is_done:
            return beams.best()
        cache.select_rows(torch.tensor([candidate.beam for candidate in survivors], device=model.device))
        input_ids = torch.tensor([[candidate.token_id] for candidate in survivors], device=model.device)


class _Beams:
    """The running hypotheses, best first, and the best `num_beams` of the finished ones."""

    def __init__(self, params: BeamParams, ends: Sequence[int], limit: int) -> None:
        self._params = params
        self._ends = list(ends)
        self._limit = limit
        # Enough candidates that num_beams are left to go on with even if every beam's best tokens end it.
        self._num_candidates = max(2, 1 + len(ends)) * params.num_beams
        self._running: list[tuple[list[int], float]] = [([], 0.0)]
        self._finished: list[BeamHypothesis] = []
        self._length = 0
        self.is_done = False

    def advance(self, logprobs: Tensor) -> list[_Candidate]:
        """Lengthen the running hypotheses by `logprobs` [running, V]; what goes on, in the order of the new rows."""
        candidates = self._candidates(logprobs)
        self._length += 1
        survivors: list[_Candidate] = []
        for rank, candidate in enumerate(candidates):
            ended = candidate.token_id in self._ends
            if not ended and self._length < self._limit:
                survivors.append(candidate)
            elif rank < self._params.num_beams:  # the others are there to go on with only
                self._finish(candidate, "stop" if ended else "length")
        survivors = survivors[: self._params.num_beams]
        self._running = [(self._tokens(candidate), candidate.logprob) for candidate in survivors]
        self._finished = self.best()[: self._params.num_beams]
        self.is_done = not survivors or self._is_settled()
        return survivors

    def best(self) -> list[BeamHypothesis]:
        return sorted(self._finished, key=lambda hypothesis: -hypothesis.score)

    def _candidates(self, logprobs: Tensor) -> list[_Candidate]:
        """The most likely lengthened hypotheses, best first."""
        if self._length < self._params.min_tokens:
            logprobs = logprobs.clone()
            logprobs[:, [token_id for token_id in self._ends if token_id < logprobs.shape[1]]] = -torch.inf
        sums = torch.tensor([total for _, total in self._running], device=logprobs.device)
        totals = (logprobs + sums[:, None]).flatten()
        best = totals.topk(min(self._num_candidates, totals.shape[0]))
        width = logprobs.shape[1]
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [_Candidate(index // width, index % width, total) for index, total in pairs if total > -math.inf]

    def _finish(self, candidate: _Candidate, reason: FinishReason) -> None:
        score = self._score(candidate.logprob, self._length)
        self._finished.append(BeamHypothesis(self._tokens(candidate), candidate.logprob, score, reason))

    def _tokens(self, candidate: _Candidate) -> list[int]:
        return [*self._running[candidate.beam][0], candidate.token_id]

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self._params.length_penalty

    def _is_settled(self) -> bool:
        """Whether the finished hypotheses are as many as asked for and no running one can better them."""
        if len(self._finished) < self._params.num_beams:
            return False
        if self._params.early_stopping == "first":
            return True
        favours_long = self._params.early_stopping == "never" and self._params.length_penalty > 0
        length = self._limit if favours_long else self._length
        return self._score(self._running[0][1], length) <= self._finished[-1].score


def _require(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise InvalidSamplingParamsError(name, rule)
