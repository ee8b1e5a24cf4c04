"""Many sequences at once: each step is one forward pass over all that run, whatever their lengths.

A sequence that ends leaves, and a waiting one takes its place in the next step. On the CPU with packed weights
(`model.packed_model.pack_model`) a sequence's tokens are, to the bit, those that `generate()` gives it alone; elsewhere
products of other sizes may round differently, and a tie may fall the other way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.backends import select_backend
from model.generate import (
    CausalModel,
    GeneratedToken,
    GenerationOutput,
    check_prompt,
    drawn_id,
    end_ids,
    finish_reason_of,
    token_logprobs,
)
from model.kv_cache import PagedKVCache
from model.paged_attention import AttentionMetadata, PagedBatch
from model.sampling import Sampler, SamplingBatch, SamplingRow
from model.sampling_params import SamplingParams

BLOCK_SIZE = 16
MAX_PROMPT_TOKENS = 4_096
"""Prompt tokens that one step takes in, unless a single prompt has more: what bounds the memory of a step."""


@dataclass(frozen=True, slots=True)
class BatchToken:
    """A token of the sequence `index`, counted in the order of the prompts."""

    index: int
    token: GeneratedToken


@dataclass(slots=True)
class _Sequence:
    """`slot` is its row of the cache; `cached` tokens of prompt and output lie there."""

    index: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    ends: frozenset[int]
    slot: int = -1
    cached: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def new_tokens(self) -> list[int]:
        """What the next step must feed: all of the prompt at first, then the last token."""
        return self.output[-1:] if self.cached else self.prompt


class BatchGenerator:
    """Continues prompts together: call `step` until `is_done`.

    `prompts[i]` is continued by `params[i]`; ends, limits and refusals are those of `model.generate`. At most
    `max_rows` sequences run at a time, each with room in the cache for the longest.

    Raises PromptError for a prompt that `generate` would refuse, InvalidSamplingParamsError as it and the
    sampler do.
    """

    def __init__(
        self,
        model: CausalModel,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        max_rows: int = 32,
        eos_token_ids: Sequence[int] | None = None,
        valid_vocab_size: int | None = None,
    ) -> None:
        config = model.config
        eos = config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
        self._model = model
        self._sampler = Sampler(
            config.vocab_size, valid_vocab_size=valid_vocab_size, eos_token_ids=eos, device=model.device
        )
        sequences = []
        for index, (prompt, row_params) in enumerate(zip(prompts, params, strict=True)):
            check_prompt(prompt, config)
            row_params.require_tokens()
            limit = min(row_params.max_tokens, config.max_seq_len - len(prompt))
            ends = frozenset(end_ids(row_params, eos))
            sequences.append(_Sequence(index, list(prompt), row_params, limit, ends))
        self._waiting = deque(sequences)
        self._running: list[_Sequence] = []
        self._batch: SamplingBatch | None = None
        rows = min(max_rows, len(sequences))
        self._free_slots = list(reversed(range(rows)))
        self._cache = _RowCache(model, rows, max((len(s.prompt) + s.limit for s in sequences), default=1))

    @property
    def is_done(self) -> bool:
        return not self._running and not self._waiting

    def step(self) -> list[BatchToken]:
        """One token for each running sequence; sequences whose token has a finish_reason have ended."""
        self._admit()
        if not self._running:
            return []
        with torch.no_grad():
            logits = self._forward()
            batch = self._sampling_batch()
            positions = torch.tensor([len(s.output) for s in self._running], device=self._model.device)
            output = self._sampler.sample(logits, batch, positions)
            batch.record(output.token_ids)
        tokens = []
        for row, (sequence, token_id) in enumerate(zip(self._running, output.token_ids.tolist(), strict=True)):
            sequence.output.append(drawn_id(token_id))
            reason = finish_reason_of(token_id in sequence.ends, len(sequence.output) == sequence.limit)
            logprobs = token_logprobs(output, row, sequence.params)
            tokens.append(BatchToken(sequence.index, GeneratedToken(token_id, logprobs, reason)))
        for entry in tokens:
            if entry.token.finish_reason is not None:
                self.stop(entry.index)
        return tokens

    def stop(self, index: int) -> None:
        """End a sequence; nothing if it has ended."""
        for sequence in self._running:
            if sequence.index == index:
                self._running.remove(sequence)
                self._free_slots.append(sequence.slot)
                self._batch = None
                return
        self._waiting = deque(sequence for sequence in self._waiting if sequence.index != index)

    def _admit(self) -> None:
        taken = 0
        while self._waiting and self._free_slots:
            taken += len(self._waiting[0].prompt)
            if taken > MAX_PROMPT_TOKENS and taken > len(self._waiting[0].prompt):
                return
            sequence = self._waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self._running.append(sequence)
            self._batch = None

    def _forward(self) -> Tensor:
        """Logits [B, V] behind each running sequence's last token."""
        device = self._model.device
        fed = [sequence.new_tokens for sequence in self._running]
        spans = [(s.slot, s.cached, s.cached + len(tokens)) for s, tokens in zip(self._running, fed, strict=True)]
        positions, paged = self._cache.extend(spans)
        input_ids = torch.tensor([token_id for tokens in fed for token_id in tokens], device=device)
        hidden = self._model.forward_paged(input_ids, positions, paged)
        last = paged.metadata.cu_seqlens_q[1:].long() - 1
        for sequence, (_, _, end) in zip(self._running, spans, strict=True):
            sequence.cached = end
        return self._model.compute_logits(hidden[last])

    def _sampling_batch(self) -> SamplingBatch:
        if self._batch is None:
            rows = [SamplingRow(s.params, s.prompt, s.output) for s in self._running]
            self._batch = self._sampler.build_batch(rows)
        return self._batch


def generate_batch(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    max_rows: int = 32,
    eos_token_ids: Sequence[int] | None = None,
    valid_vocab_size: int | None = None,
) -> list[GenerationOutput]:
    """Continue every prompt to its end. Arguments and errors are those of `BatchGenerator`."""
    generator = BatchGenerator(
        model, prompts, params, max_rows=max_rows, eos_token_ids=eos_token_ids, valid_vocab_size=valid_vocab_size
    )
    tokens: list[list[GeneratedToken]] = [[] for _ in prompts]
    while not generator.is_done:
        for entry in generator.step():
            tokens[entry.index].append(entry.token)
    return [GenerationOutput.of(row, row_params) for row, row_params in zip(tokens, params, strict=True)]


class _RowCache:
    """A paged cache in which row r owns the blocks [r * blocks_each, (r + 1) * blocks_each)."""

    def __init__(self, model: CausalModel, rows: int, max_len: int) -> None:
        self._window = model.config.sliding_window
        self._backend = select_backend("auto", model.config, model.device, model.dtype, BLOCK_SIZE)
        blocks_each = -(-max_len // BLOCK_SIZE)
        self._cache = PagedKVCache.allocate(
            model.config,
            self._backend.block_shape,
            num_blocks=rows * blocks_each,
            block_size=BLOCK_SIZE,
            dtype=model.dtype,
            device=model.device,
        )
        blocks = torch.arange(rows * blocks_each, dtype=torch.int32, device=model.device)
        self._block_tables = blocks.view(rows, blocks_each)

    def extend(self, spans: Sequence[tuple[int, int, int]]) -> tuple[Tensor, PagedBatch]:
        """Positions [N] and the batch to run for the tokens [start, end) of each (row, start, end)."""
        device = self._block_tables.device
        row_slots = self._block_tables.shape[1] * BLOCK_SIZE
        positions = [position for _, start, end in spans for position in range(start, end)]
        slots = [row * row_slots + position for row, start, end in spans for position in range(start, end)]
        offsets = [0]
        for _, start, end in spans:
            offsets.append(offsets[-1] + end - start)
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32, device=device),
            context_lens=torch.tensor([end for _, _, end in spans], dtype=torch.int32, device=device),
            block_tables=self._block_tables[[row for row, _, _ in spans]],
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            num_tokens=len(slots),
            max_query_len=max(end - start for _, start, end in spans),
            max_context_len=max(end for _, _, end in spans),
        )
        batch = PagedBatch(self._backend, self._cache, metadata, self._window)
        return torch.tensor(positions, dtype=torch.int64, device=device), batch
