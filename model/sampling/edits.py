"""What changes the logits before temperature: logit_bias, penalties and min_tokens.

All of it touches a few ids per row, so it works on gathered values instead of passing over the vocabulary.
`scores` is a contiguous float32 [B, N]; "flat" indices point into it as one long row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import InvalidSamplingParamsError
from model.sampling_params import SamplingParams

_MIN_REPETITION_PENALTY = 1e-20  # a smaller divisor would overflow float32
_GROWTH = 64  # how many tokens a history takes before it is enlarged


@dataclass(frozen=True, slots=True)
class LogitBias:
    """`index` flat [E] and `values` [E] of every biased id."""

    index: Tensor
    values: Tensor

    @classmethod
    def build(
        cls, params: Sequence[SamplingParams], vocab_size: int, valid_vocab_size: int, width: int, device: torch.device
    ) -> LogitBias | None:
        """Raises InvalidSamplingParamsError for an id outside the model's output width `vocab_size`."""
        index: list[int] = []
        values: list[float] = []
        for row, row_params in enumerate(params):
            for token_id, bias in row_params.logit_bias.items():
                if not 0 <= token_id < vocab_size:
                    raise InvalidSamplingParamsError("logit_bias", f"must use token ids from 0 to {vocab_size - 1}")
                if token_id < valid_vocab_size:
                    index.append(row * width + token_id)
                    values.append(bias)
        if not index:
            return None
        return cls(
            torch.tensor(index, dtype=torch.int64, device=device),
            torch.tensor(values, dtype=torch.float32, device=device),
        )

    def apply(self, scores: Tensor) -> None:
        scores.view(-1).index_add_(0, self.index, self.values)


@dataclass(frozen=True, slots=True)
class MinTokens:
    """Ids that would end a sequence, barred until it has min_tokens: flat `index`, `rows` and `floors`, all [E]."""

    index: Tensor
    rows: Tensor
    floors: Tensor

    @classmethod
    def build(
        cls,
        params: Sequence[SamplingParams],
        eos_token_ids: Sequence[int],
        valid_vocab_size: int,
        width: int,
        device: torch.device,
    ) -> MinTokens | None:
        """EOS is no end for a sequence with ignore_eos, so there it stays allowed."""
        entries: list[tuple[int, int, int]] = []
        for row, row_params in enumerate(params):
            if row_params.min_tokens == 0:
                continue
            ending = {*row_params.stop_token_ids, *(() if row_params.ignore_eos else eos_token_ids)}
            for token_id in sorted(ending):
                if 0 <= token_id < valid_vocab_size:
                    entries.append((row * width + token_id, row, row_params.min_tokens))
        if not entries:
            return None
        index, rows, floors = torch.tensor(entries, dtype=torch.int64, device=device).unbind(1)
        return cls(index, rows, floors)

    def apply(self, scores: Tensor, positions: Tensor) -> None:
        """`positions` [B] count the tokens generated so far."""
        barred = positions.index_select(0, self.rows) < self.floors
        flat = scores.view(-1)
        kept = flat.index_select(0, self.index)
        flat.index_copy_(0, self.index, kept.masked_fill_(barred, -torch.inf))


class Penalties:
    """Repetition penalty over prompt and output, presence and frequency penalties over the output.

    P rows have penalties. `history` [P, W] lists the ids each of them has seen (distinct ones at first, then every
    sampled one), padded with id 0; `seen` [P, V] and `counts` [P, V] tell what an id's penalty is. A value written
    back depends on its id alone, so an id may be listed twice or, as padding, without having been seen.
    """

    def __init__(
        self,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        valid_vocab_size: int,
        width: int,
        device: torch.device,
    ) -> None:
        """`rows` are the batch rows that the other sequences describe, one entry each."""
        histories = [
            [token_id for token_id in dict.fromkeys((*prompt, *output)) if token_id < valid_vocab_size]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        lengths = [len(history) for history in histories]
        self._used = max(lengths)
        padded = [history + [0] * (self._used + _GROWTH - len(history)) for history in histories]
        self._history = torch.tensor(padded, dtype=torch.int64, device=device)
        self._lengths = torch.tensor(lengths, dtype=torch.int64, device=device)[:, None]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._offsets = self._rows[:, None] * width
        self._seen = torch.zeros(len(rows), valid_vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(len(rows), valid_vocab_size, dtype=torch.float32, device=device)
        self._fill_tables(histories, outputs, valid_vocab_size)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._repetition = column([max(p.repetition_penalty, _MIN_REPETITION_PENALTY) for p in params])
        self._presence = column([p.presence_penalty for p in params])
        self._frequency = column([p.frequency_penalty for p in params])

    def _fill_tables(
        self, histories: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], valid_vocab_size: int
    ) -> None:
        seen = [row * valid_vocab_size + token_id for row, ids in enumerate(histories) for token_id in ids]
        counted = [
            (row * valid_vocab_size + token_id, count)
            for row, output in enumerate(outputs)
            for token_id, count in Counter(output).items()
            if token_id < valid_vocab_size
        ]
        device = self._seen.device
        self._seen.view(-1)[torch.tensor(seen, dtype=torch.int64, device=device)] = True
        if counted:
            index, counts = torch.tensor(counted, dtype=torch.int64, device=device).unbind(1)
            self._counts.view(-1).index_copy_(0, index, counts.float())

    @classmethod
    def build(
        cls,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        valid_vocab_size: int,
        width: int,
        device: torch.device,
    ) -> Penalties | None:
        """The penalties of a batch, or None when no row has any."""
        rows = [row for row, row_params in enumerate(params) if row_params.has_penalties]
        if not rows:
            return None
        return cls(
            rows,
            [params[row] for row in rows],
            [prompts[row] for row in rows],
            [outputs[row] for row in rows],
            valid_vocab_size,
            width,
            device,
        )

    def apply(self, scores: Tensor) -> None:
        """As Keskar et al. 2019 (repetition) and OpenAI's API (presence, frequency) define them."""
        ids = self._history[:, : self._used]
        index = (ids + self._offsets).view(-1)
        flat = scores.view(-1)
        values = flat.index_select(0, index).view(ids.shape)
        repeated = torch.where(values > 0, values / self._repetition, values * self._repetition)
        values = torch.where(self._seen.gather(1, ids), repeated, values)
        counts = self._counts.gather(1, ids)
        values = values - counts * self._frequency - (counts > 0) * self._presence
        flat.index_copy_(0, index, values.view(-1))

    def record(self, token_ids: Tensor) -> None:
        """Add the tokens that the batch's rows have just been given [B]."""
        ids = token_ids.index_select(0, self._rows)[:, None]
        if self._used == self._history.shape[1]:
            self._history = torch.nn.functional.pad(self._history, (0, max(_GROWTH, self._used)))
        self._history.scatter_(1, self._lengths, ids)
        self._lengths += 1
        self._used += 1
        self._seen.scatter_(1, ids, True)
        self._counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
