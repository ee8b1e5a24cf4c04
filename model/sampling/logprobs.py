"""Log-probabilities of sampled tokens and their best alternatives, from the raw model distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.draw import BLOCK
from model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Logprobs:
    """`chosen` [B] float32 and the K best `top_ids` [B, K] int64 with `top_logprobs` [B, K], best first.

    K is the largest number that a row of the batch asked for; a row that asked for fewer uses its first ones.
    Equal log-probabilities are in order of id. A row that asked for none holds NaN and -1.
    """

    chosen: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True, slots=True)
class LogprobsRequest:
    """Which rows want log-probabilities (`rows` [L], None: all) and the largest number of alternatives."""

    rows: Tensor | None
    num_top: int

    @classmethod
    def build(
        cls, params: Sequence[SamplingParams], valid_vocab_size: int, device: torch.device
    ) -> LogprobsRequest | None:
        """None when no row asks. At most `valid_vocab_size` alternatives exist."""
        wanted = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None}
        if not wanted:
            return None
        everyone = len(wanted) == len(params)
        rows = None if everyone else torch.tensor(list(wanted), dtype=torch.int64, device=device)
        return cls(rows, min(max(wanted.values()), valid_vocab_size))

    def compute(self, logits: Tensor, token_ids: Tensor, scratch: Tensor, out: Tensor) -> Logprobs:
        """Of the raw `logits` [B, V] and the sampled `token_ids` [B]; the buffers [B, N] are overwritten."""
        rows = self.rows
        if rows is None:
            return raw_logprobs(logits, token_ids, self.num_top, scratch, out)
        count, size = rows.shape[0], logits.shape[0]
        found = raw_logprobs(
            logits.index_select(0, rows), token_ids.index_select(0, rows), self.num_top, scratch[:count], out[:count]
        )

        def spread(values: Tensor, fill: float) -> Tensor:
            full = torch.full((size, *values.shape[1:]), fill, dtype=values.dtype, device=values.device)
            return full.index_copy_(0, rows, values)

        return Logprobs(
            spread(found.chosen, torch.nan), spread(found.top_ids, -1), spread(found.top_logprobs, torch.nan)
        )


def raw_logprobs(logits: Tensor, token_ids: Tensor, num_top: int, scratch: Tensor, out: Tensor) -> Logprobs:
    """log_softmax in float32 of `logits` [L, V]: of `token_ids` [L] and of the `num_top` best.

    The float32 buffers [L, N] are overwritten. Rows are padded to N so that all are aligned alike, since CUDA's
    softmax adds in an order that depends on it.
    """
    width = logits.shape[1]
    scratch[:, :width] = logits
    scratch[:, width:] = -torch.inf
    logprobs = torch.log_softmax(scratch, dim=-1, out=out)
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
    top_ids = _top_ids(logprobs, num_top)
    return Logprobs(chosen, top_ids, logprobs.gather(1, top_ids))


def _top_ids(logprobs: Tensor, k: int) -> Tensor:
    """Ids of the k best [L, k] of `logprobs` [L, N], equal ones in order of id.

    The k best lie in the k best blocks: those with the largest maxima, the earlier one of two with equal maxima.
    """
    rows, width = logprobs.shape
    num_blocks = width // BLOCK
    best = logprobs.view(rows, num_blocks, BLOCK).amax(dim=-1)
    blocks = torch.arange(num_blocks, device=logprobs.device)
    chosen = _order_keys(best, blocks).topk(min(k, num_blocks), dim=-1).indices
    ids = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=logprobs.device)).view(rows, -1)
    keys = _order_keys(logprobs.gather(1, ids), ids)
    return ids.gather(1, keys.topk(k, dim=-1).indices)


def _order_keys(logprobs: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order by log-probability, then by lower id; unique, so topk has no choice to make.

    Log-probabilities are not positive: among them a smaller magnitude is a better one.
    """
    magnitude = (logprobs.view(torch.int32) & 0x7FFFFFFF).long()
    return -((magnitude << 32) + ids)
