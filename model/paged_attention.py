"""Attention over a paged KV cache: what a backend must offer, and the torch reference that the others match.

A flattened batch holds N query tokens of B sequences, one sequence after the other. Each sequence's newest tokens
are the queries; its keys and values lie in the blocks that its row of `block_tables` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import PagedKVCache


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each query token belongs. All tensors lie on the cache's device.

    cu_seqlens_q int32 [B + 1]: query offsets of the sequences; context_lens int32 [B]: tokens of each sequence
    including this step's; block_tables int32 [B, max blocks]; slot_mapping int64 [N]: the cache slot (block times
    block size plus offset) of each query token, -1 for padding tokens, whose output is zero. `num_tokens` counts the
    query tokens without padding.
    """

    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    num_tokens: int
    max_query_len: int
    max_context_len: int


class AttentionBackend(Protocol):
    """One way of running paged attention."""

    name: str

    def block_shape(
        self, config: ModelConfig, block_size: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one block's keys and of its values."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        window: int | None,
    ) -> Tensor:
        """Store k, v [N, K, d] in one layer's cache, then attend q [N, H, d] causally; returns [N, H, d].

        The scores are scaled by 1 / sqrt(d); `window` limits how many tokens back, itself included, a token sees.
        """
        ...


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A step's view of the cache, handed down through the layers."""

    backend: AttentionBackend
    cache: PagedKVCache
    metadata: AttentionMetadata
    window: int | None = None

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer_index], self.cache.values[layer_index]
        return self.backend.attend(q, k, v, keys, values, self.metadata, self.window)


class TorchBackend:
    """The reference, in plain torch on any device: clear and slow."""

    name = "torch"

    def block_shape(
        self, config: ModelConfig, block_size: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape = (block_size, config.num_kv_heads, config.head_dim)
        return shape, shape

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        window: int | None,
    ) -> Tensor:
        store_kv(k, v, key_cache, value_cache, metadata.slot_mapping)
        return paged_attention(q, key_cache, value_cache, metadata, window)


def store_kv(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k, v [N, K, d] to their slots of the caches [blocks, block_size, K, d]; slot -1 is skipped."""
    used = slot_mapping >= 0
    slots = slot_mapping[used]
    key_cache.view(-1, *key_cache.shape[2:])[slots] = k[used]
    value_cache.view(-1, *value_cache.shape[2:])[slots] = v[used]


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, window: int | None = None
) -> Tensor:
    """Causal attention of q [N, H, d] over the caches [blocks, block_size, K, d]; softmax in float32."""
    out = torch.zeros_like(q)
    starts = metadata.cu_seqlens_q.tolist()
    for index, context_len in enumerate(metadata.context_lens.tolist()):
        start, end = starts[index], starts[index + 1]
        if start == end:
            continue
        block_size = key_cache.shape[1]
        blocks = metadata.block_tables[index, : -(-context_len // block_size)].long()
        keys = key_cache[blocks].flatten(0, 1)[:context_len]
        values = value_cache[blocks].flatten(0, 1)[:context_len]
        out[start:end] = _attend_one(q[start:end], keys, values, window)
    return out


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """q [T, H, d] holds the last T of the S tokens in keys, values [S, K, d]."""
    num_queries, num_heads, head_dim = q.shape
    context_len, num_kv_heads, _ = keys.shape
    groups = num_heads // num_kv_heads
    keys = keys.repeat_interleave(groups, dim=1).transpose(0, 1)
    values = values.repeat_interleave(groups, dim=1).transpose(0, 1)
    scores = (q.transpose(0, 1) @ keys.transpose(1, 2)).float() * head_dim**-0.5
    query_positions = torch.arange(context_len - num_queries, context_len, device=q.device)[:, None]
    key_positions = torch.arange(context_len, device=q.device)[None, :]
    hidden = key_positions > query_positions
    if window is not None:
        hidden |= key_positions <= query_positions - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(values.dtype)
    return (weights @ values).transpose(0, 1)
