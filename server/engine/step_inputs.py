"""StepInputs: a scheduled batch as tensors for the model."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.packed_linear import MIN_ROWS
from model.paged_attention import AttentionMetadata
from server.engine.drawn_tokens import PendingTokens
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence
from server.engine.transfer import HostToDevice


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """Of a step that scores prompts: which of its wanted rows are to be sampled (`sampled` [samples]), which give
    log-probabilities (`scored` [scored]) and of which tokens (`targets` [scored])."""

    sampled: Tensor
    scored: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """input_ids and positions are [N]. sample_rows [rows], ascending, are the rows whose logits are wanted: those
    whose next token is to be drawn, and with `score` those of prompts that are scored. sample_positions [samples] is
    how many tokens the sequences that get a token have generated so far."""

    input_ids: Tensor
    positions: Tensor
    sample_rows: Tensor
    sample_positions: Tensor
    metadata: AttentionMetadata
    score: ScoreInputs | None = None
    pending: PendingTokens | None = None


@dataclass(frozen=True, slots=True)
class DecodeArrays:
    """A step of decodes on the host, one entry for each of B sequences: int64 input_ids, positions, slots, generated
    (how many tokens it has generated so far) and pending_rows (see PendingTokens, with bool is_pending); int32
    context_lens and, at their full width, block_tables [B, max_blocks], a view that the next step overwrites."""

    sequences: List[Sequence]
    input_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    generated: np.ndarray
    is_pending: np.ndarray
    pending_rows: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray


_NO_SLOTS = np.empty(0, dtype=np.int64)


class InputBuilder:
    """Builds each step's inputs; block tables are kept between steps and only extended while the batch stays."""

    def __init__(
        self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device, *, needs_slots: bool = True,
        numbers: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Without `needs_slots`, the slot mapping is left empty and no padding is added. `numbers` are the cache's
        (see PagedKVCache)."""
        self.block_size = block_size
        self._numbers = numbers
        self._needs_slots = needs_slots
        self._transfer = None if device.type == "cpu" else HostToDevice(device)
        self._tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._known: list[tuple[int, int, int]] = []

    def build(self, batch: ScheduledBatch) -> StepInputs:
        sequences, counts = batch.sequences, batch.num_scheduled_tokens
        decodes = batch.num_decodes
        tokens = [seq.token_ids[-1] for seq in sequences[:decodes]]
        positions = [seq.num_computed_tokens for seq in sequences[:decodes]]
        for seq, count in zip(sequences[decodes:], counts[decodes:], strict=True):
            start = seq.num_computed_tokens
            tokens += seq.token_ids[start : start + count]
            tokens += seq.draft
            positions += range(start, start + count)
        num_tokens = len(tokens)
        padding = max(0, MIN_ROWS - num_tokens) if self._needs_slots else 0
        context_lens = [seq.num_computed_tokens + count for seq, count in zip(sequences, counts, strict=True)]
        ends = np.cumsum([0, *counts], dtype=np.int32)
        positions_array = np.array(positions + [0] * padding, dtype=np.int64)
        tables = self._block_tables(sequences)
        sample_rows, generated = _sampled_rows(batch, ends)
        scored, targets = _scored_rows(batch, ends)
        score_arrays: tuple[np.ndarray, ...] = ()
        if len(scored):
            wanted = np.sort(np.concatenate([sample_rows, scored]))
            score_arrays = np.searchsorted(wanted, sample_rows), np.searchsorted(wanted, scored), targets
            sample_rows = wanted
        arrays = [
            np.array(tokens + [0] * padding, dtype=np.int64),
            positions_array,
            self._slots(positions_array, counts, tables, padding) if self._needs_slots else _NO_SLOTS,
            sample_rows.astype(np.int64),
            generated,
            ends,
            np.array(context_lens, dtype=np.int32),
            tables,
        ]
        pending_arrays = _pending(sequences[:decodes])
        sent = self._send([*arrays, *score_arrays, *pending_arrays])
        input_ids, token_positions, slots, rows, sample_positions, cu_seqlens_q, lens, block_tables = sent[
            : len(arrays)
        ]
        score, pending = sent[len(arrays) :][: len(score_arrays)], sent[len(arrays) + len(score_arrays) :]
        metadata = AttentionMetadata(
            cu_seqlens_q=cu_seqlens_q,
            context_lens=lens,
            block_tables=block_tables,
            slot_mapping=slots,
            num_tokens=num_tokens,
            max_query_len=max(counts),
            max_context_len=max(context_lens),
        )
        return StepInputs(
            input_ids,
            token_positions,
            rows,
            sample_positions,
            metadata,
            ScoreInputs(*score) if score else None,
            PendingTokens(*pending) if pending else None,
        )

    def decodes(self, batch: ScheduledBatch) -> DecodeArrays:
        """A step in which every sequence decodes, for a captured graph."""
        sequences = batch.sequences
        positions = np.array([seq.num_computed_tokens for seq in sequences], dtype=np.int64)
        tables = self._block_tables(sequences)
        is_pending, rows = _pending(sequences) or (np.zeros(len(sequences), bool), np.zeros(len(sequences), np.int64))
        return DecodeArrays(
            sequences,
            np.array([seq.token_ids[-1] for seq in sequences], dtype=np.int64),
            positions,
            self._slots(positions, batch.num_scheduled_tokens, tables, 0),
            np.array([seq.num_output_tokens + seq.num_pending for seq in sequences], dtype=np.int64),
            is_pending,
            rows,
            (positions + 1).astype(np.int32),
            self._tables[: len(sequences)],
        )

    def _slots(self, positions: np.ndarray, counts: List[int], tables: np.ndarray, padding: int) -> np.ndarray:
        """The cache slot of each token, -1 for padding."""
        rows = np.repeat(np.arange(len(counts) + 1), [*counts, padding])
        rows[rows == len(counts)] = 0
        slots = tables[rows, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        if padding:
            slots[-padding:] = -1
        return slots

    def _block_tables(self, sequences: List[Sequence]) -> np.ndarray:
        """Rows of block ids for the batch; a row is written again only where its sequence or length changed."""
        known, keys = self._known, []
        for row, seq in enumerate(sequences):
            # Between preemptions a table only grows, so these three say whether the row still holds it.
            key = (seq.request_id, seq.num_preemptions, len(seq.block_table))
            keys.append(key)
            if row >= len(known) or known[row] != key:
                blocks = seq.block_table
                self._tables[row, : key[2]] = blocks if self._numbers is None else self._numbers[blocks]
        self._known = keys
        widest = max(key[2] for key in keys)
        return self._tables[: len(sequences), :widest]

    def _send(self, arrays: List[np.ndarray]) -> List[Tensor]:
        if self._transfer is None:
            return [torch.from_numpy(array) for array in arrays]
        return self._transfer.send(arrays)


def _pending(decodes: List[Sequence]) -> tuple[np.ndarray, ...]:
    """The arrays of PendingTokens, or none where the host knows all tokens."""
    is_pending = np.array([seq.num_pending > 0 for seq in decodes], dtype=bool)
    if not is_pending.any():
        return ()
    return is_pending, np.array([max(seq.pending_row, 0) for seq in decodes], dtype=np.int64)


def _sampled_rows(batch: ScheduledBatch, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The step's rows [samples] behind which a token is drawn, and how many tokens [samples] come before it: the last
    row of a sequence, and with a draft the rows of the draft too."""
    rows = ends[1:][np.array(batch.needs_sample, dtype=bool)] - 1
    sampled = [seq for seq, wanted in zip(batch.sequences, batch.needs_sample, strict=True) if wanted]
    generated = np.array([seq.num_output_tokens + seq.num_pending for seq in sampled], dtype=np.int64)
    if not any(seq.draft for seq in sampled):
        return rows, generated
    lengths = [len(seq.draft) for seq in sampled]
    steps = np.concatenate([np.arange(length + 1) for length in lengths])
    repeats = np.array(lengths) + 1
    return np.repeat(rows - np.array(lengths), repeats) + steps, np.repeat(generated, repeats) + steps


def _scored_rows(batch: ScheduledBatch, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The step's rows [scored] to score, sequence by sequence, and the token [scored] that each is to tell of."""
    rows: list[int] = []
    targets: list[int] = []
    for index in range(batch.num_decodes, len(batch.sequences)):
        seq = batch.sequences[index]
        if seq.prompt_score is None:
            continue
        wanted = seq.prompt_score.rows(seq.num_computed_tokens, batch.num_scheduled_tokens[index])
        offset = int(ends[index]) - seq.num_computed_tokens
        rows += range(wanted.start + offset, wanted.stop + offset)
        targets += seq.prompt_score.targets[wanted.start : wanted.stop]
    return np.array(rows, dtype=np.int64), np.array(targets, dtype=np.int64)
