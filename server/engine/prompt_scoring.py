"""Log-probabilities of prompts' tokens, in bounded memory: logits exist for a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.sampling import Sampler
from model.sampling.draw import padded_width
from model.sampling.logprobs import Logprobs, raw_logprobs
from server.engine.explaining import Explainer
from server.engine.messages import TokenExplanation, TokenLogprobs
from server.engine.scheduler import ScheduledBatch

# Rows whose logits exist at once: enough for products to run at full speed, and 13 MB of float32 for GPT-2's
# vocabulary, where a whole context of them would be 200.
MAX_ROWS = 64


class Scored(NamedTuple):
    """What a step tells of prompts' tokens, by request id."""

    prompt_logprobs: dict[int, list[TokenLogprobs]]
    explained: dict[int, list[TokenExplanation]]


NOTHING_SCORED = Scored({}, {})


class PromptScorer:
    """Scores the rows of a step. The distribution is over all of the model's outputs, as training measures it.

    `sampler` explains the tokens of which that is asked.
    """

    def __init__(self, vocab_size: int, device: torch.device, sampler: Sampler) -> None:
        self._sampler = sampler
        self._vocab_size = vocab_size
        self._width = padded_width(vocab_size)
        self._device = device
        self._buffers = torch.empty(0)

    def score(
        self, batch: ScheduledBatch, compute_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
    ) -> Scored:
        """What the batch tells of prompts' tokens.

        `hidden` [scored, D] are the states of the rows to score and `targets` [scored] the tokens behind them, both in
        the order of `StepInputs.score`. `compute_logits` gets at most MAX_ROWS rows at a time.
        """
        explainer = Explainer(batch, self._sampler) if Explainer.is_wanted(batch) else None
        if explainer is not None:
            compute_logits = explainer.watch(compute_logits)
        wanted = _wanted(batch)
        num_top = min(max(top for _, _, top in wanted), self._vocab_size)
        slices = [
            self._score_rows(
                compute_logits(hidden[start : start + MAX_ROWS]), targets[start : start + MAX_ROWS], num_top
            )
            for start in range(0, len(targets), MAX_ROWS)
        ]
        # Only now does the host wait for the device.
        ids = targets.tolist()
        chosen = torch.cat([each.chosen for each in slices]).tolist()
        top_ids = torch.cat([each.top_ids for each in slices]).tolist()
        top_logprobs = torch.cat([each.top_logprobs for each in slices]).tolist()
        result: dict[int, list[TokenLogprobs]] = {}
        row = 0
        for request_id, count, top in wanted:
            result[request_id] = [
                TokenLogprobs(
                    ids[index], chosen[index], list(zip(top_ids[index][:top], top_logprobs[index][:top], strict=True))
                )
                for index in range(row, row + count)
            ]
            row += count
        return Scored(result, {} if explainer is None else explainer.found)

    def _score_rows(self, logits: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        if self._buffers.numel() == 0 and self._device.type == "cpu":
            # Kept: fresh pages would cost more than the arithmetic. CUDA's allocator reuses memory itself.
            self._buffers = self._new_buffers(MAX_ROWS)
        rows = logits.shape[0]
        buffers = self._buffers[:, :rows] if self._buffers.numel() else self._new_buffers(rows)
        return raw_logprobs(logits, targets, num_top, buffers[0], buffers[1])

    def _new_buffers(self, rows: int) -> Tensor:
        return torch.empty(2, rows, self._width, dtype=torch.float32, device=self._device)


def _wanted(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    """(request id, rows to score in this step, alternatives for each) of the sequences that are scored."""
    wanted = []
    for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
        score = seq.prompt_score
        if score is not None and (rows := score.rows(seq.num_computed_tokens, count)):
            wanted.append((seq.request_id, len(rows), score.num_top))
    return wanted
