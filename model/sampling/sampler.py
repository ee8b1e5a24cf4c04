"""Sampler: the next token of every sequence in a batch, each by its own parameters.

A sequence's token depends on its own logits, parameters, seed and position and on nothing else: to the bit, it is
the same alone or beside any neighbours. Nothing here waits for the device.

Order: logit_bias, penalties, min_tokens, allowed tokens, temperature, top_k, top_p, min_p, draw.
B is rows of the batch, R those that draw (temperature above 0), N the padded width, V the model's output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.draw import argmax, draw, padded_width, probabilities, seed_state, uniforms
from model.sampling.edits import LogitBias, MinTokens, Penalties
from model.sampling.filters import Filters
from model.sampling.logprobs import Logprobs, LogprobsRequest
from model.sampling.masks import AllowedTokens
from model.sampling.rows import MIN_TEMPERATURE, RowParameters
from model.sampling.triton_sampling import kernel_available, sample_rows
from model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One sequence of a batch. The token ids matter to penalties only."""

    params: SamplingParams
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """`token_ids` [B] int64 on the device; `logprobs` when a row asked for them.

    Where the CUDA kernel draws, the token id of a row with a NaN among its logits is -1.
    """

    token_ids: Tensor
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class RandomRows:
    """The rows that draw: `rows` [R] (None: all of the batch), `states` [R] of their seeds, `temperature` [R, 1]."""

    rows: Tensor | None
    states: Tensor
    temperature: Tensor
    filters: Filters | None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Everything about B sequences that stays the same from step to step, made by `Sampler.build_batch`.

    Serves until the batch's composition or order changes. What changes every step, the positions, goes to
    `Sampler.sample`; the tokens that were accepted must be handed to `record`, or penalties would not know them.
    `parameters` are all of the rows where the CUDA kernel draws, and `greedy_rows` and `random` are None then. Else
    `greedy_rows` is None when no row or every row is greedy.
    """

    size: int
    parameters: RowParameters | None
    greedy_rows: Tensor | None
    random: RandomRows | None
    bias: LogitBias | None
    penalties: Penalties | None
    min_tokens: MinTokens | None
    logprobs: LogprobsRequest | None

    @property
    def edits_logits(self) -> bool:
        return self.bias is not None or self.penalties is not None or self.min_tokens is not None

    def record(self, token_ids: Tensor) -> None:
        """Add the tokens [B] int64 that the rows have just been given. Free when no row has penalties."""
        if self.penalties is not None:
            with torch.no_grad():
                self.penalties.record(token_ids.clamp_min(0))  # -1 is no index


class Sampler:
    """Samples from the logits of one model; ids from `valid_vocab_size` on are padding and never sampled."""

    def __init__(
        self,
        vocab_size: int,
        *,
        valid_vocab_size: int | None = None,
        eos_token_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """`vocab_size` is the model's output width V, `valid_vocab_size` the tokenizer's (default: V)."""
        self.vocab_size = vocab_size
        self.valid_vocab_size = min(valid_vocab_size or vocab_size, vocab_size)
        self.eos_token_ids = tuple(eos_token_ids)
        self.device = torch.device(device)
        self._width = padded_width(self.valid_vocab_size)
        self._has_kernel = kernel_available(self.device)
        self._workspace = torch.empty(2, 0, self._width)

    def build_batch(self, rows: Sequence[SamplingRow]) -> SamplingBatch:
        """The batch of `rows`, in their order. Raises InvalidSamplingParamsError for a logit_bias id outside V."""
        params = [row.params for row in rows]
        valid, width, device = self.valid_vocab_size, self._width, self.device
        greedy = [index for index, p in enumerate(params) if p.is_greedy]
        some_greedy = 0 < len(greedy) < len(rows) and not self._has_kernel
        return SamplingBatch(
            size=len(rows),
            parameters=RowParameters.build(params, valid, device) if self._has_kernel else None,
            greedy_rows=torch.tensor(greedy, dtype=torch.int64, device=device) if some_greedy else None,
            random=None if self._has_kernel else self._build_random(params),
            bias=LogitBias.build(params, self.vocab_size, valid, width, device),
            penalties=Penalties.build(
                params,
                [row.prompt_token_ids for row in rows],
                [row.output_token_ids for row in rows],
                valid,
                width,
                device,
            ),
            min_tokens=MinTokens.build(params, self.eos_token_ids, valid, width, device),
            logprobs=LogprobsRequest.build(params, valid, device),
        )

    def _build_random(self, params: Sequence[SamplingParams]) -> RandomRows | None:
        chosen = [index for index, p in enumerate(params) if not p.is_greedy]
        if not chosen:
            return None
        picked = [params[index] for index in chosen]
        device = self.device
        temperatures = [max(p.temperature, MIN_TEMPERATURE) for p in picked]
        everyone = len(chosen) == len(params)
        return RandomRows(
            rows=None if everyone else torch.tensor(chosen, dtype=torch.int64, device=device),
            states=torch.tensor([seed_state(p.seed) for p in picked], dtype=torch.int64, device=device),
            temperature=torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None],
            filters=Filters.build(picked, self.valid_vocab_size, device),
        )

    @torch.no_grad()
    def sample(
        self, logits: Tensor, batch: SamplingBatch, positions: Tensor, allowed: AllowedTokens | None = None
    ) -> SamplerOutput:
        """Next token ids of a batch.

        `logits` [B, V] of any float type (not changed); `positions` [B] int64 on the same device: how many tokens
        each sequence has generated so far; `allowed` says what rows may draw at all. One instance serves one thread.
        """
        valid = logits[:, : self.valid_vocab_size]
        scores, probs = self._buffers(batch.size)
        if batch.edits_logits or allowed is not None:
            edited = self._edit(valid, scores, batch, positions, allowed)
            token_ids = self._sample(edited, batch, positions, scores, probs)
        else:
            token_ids = self._sample(valid, batch, positions, scores, probs)
        if batch.logprobs is None:
            return SamplerOutput(token_ids)
        # A row that got -1 has no log-probabilities but NaN, whichever id is looked up.
        return SamplerOutput(token_ids, batch.logprobs.compute(valid, token_ids.clamp_min(0), scores, probs))

    def _sample(self, logits: Tensor, batch: SamplingBatch, positions: Tensor, scores: Tensor, probs: Tensor) -> Tensor:
        if batch.parameters is not None:
            return self._run_kernel(logits, batch.parameters, positions, scratch=probs)
        random = batch.random
        if random is None:
            return argmax(logits)
        if batch.greedy_rows is None or random.rows is None:
            return self._draw(logits, random, positions, scores, probs)
        token_ids = torch.empty(batch.size, dtype=torch.int64, device=logits.device)
        token_ids.index_copy_(0, batch.greedy_rows, argmax(logits.index_select(0, batch.greedy_rows)))
        rows, count = random.rows, random.rows.shape[0]
        drawn = self._draw(
            logits.index_select(0, rows), random, positions.index_select(0, rows), scores[:count], probs[:count]
        )
        return token_ids.index_copy_(0, rows, drawn)

    def _run_kernel(self, logits: Tensor, parameters: RowParameters, positions: Tensor, scratch: Tensor) -> Tensor:
        token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        sample_rows(logits, self.valid_vocab_size, parameters, positions.contiguous(), scratch, token_ids)
        return token_ids

    def _edit(
        self, logits: Tensor, scores: Tensor, batch: SamplingBatch, positions: Tensor, allowed: AllowedTokens | None
    ) -> Tensor:
        """`logits` with bias, penalties, min_tokens and what is not allowed, as a view of `scores`."""
        edited = scores[:, : self.valid_vocab_size]
        edited.copy_(logits)
        if batch.bias is not None:
            batch.bias.apply(scores)
        if batch.penalties is not None:
            batch.penalties.apply(scores)
        if batch.min_tokens is not None:
            batch.min_tokens.apply(scores, positions)
        if allowed is not None:
            allowed.apply(edited)
        return edited

    def _draw(self, logits: Tensor, random: RandomRows, positions: Tensor, scores: Tensor, probs: Tensor) -> Tensor:
        """One draw per row of `logits` [R, V]; `scores` and `probs` [R, N] are overwritten."""
        scores[:, : self.valid_vocab_size] = logits
        scores[:, self.valid_vocab_size :] = -torch.inf
        scores.div_(random.temperature)
        probabilities(scores, out=probs)
        wide = None if random.filters is None else random.filters.apply(probs, scratch=scores)
        token_ids = draw(probs, uniforms(random.states, positions))
        if wide is not None:
            wide.settle(probs, token_ids, random.states, positions, scratch=scores)
        return token_ids

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Two [rows, N] float32 buffers. On the CPU they are kept, since fresh pages cost more than the arithmetic;
        CUDA's allocator reuses memory itself, and a captured graph must own what it writes to."""
        if self.device.type == "cuda":
            workspace = torch.empty(2, rows, self._width, device=self.device)
            return workspace[0], workspace[1]
        if self._workspace.shape[1] < rows:
            with torch.inference_mode(False):  # usable in and out of inference mode
                self._workspace = torch.empty(2, rows, self._width)
        return self._workspace[0, :rows], self._workspace[1, :rows]
