"""DenseKVCache: a growing cache for `Transformer.forward`, whose rows all have the same length.

It is a paged cache whose blocks lie in order, run by the same backend as the engine's, so that a sequence
generated alone takes the same arithmetic as one in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.backends import select_backend
from model.config import ModelConfig
from model.errors import ConfigError
from model.kv_cache import PagedKVCache
from model.paged_attention import AttentionMetadata, PagedBatch

_BLOCK_SIZE = 16


class DenseKVCache:
    """Keys and values of `batch_size` sequences of up to `max_len` tokens; `length` tokens are held."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str = "auto",
    ) -> None:
        self.config = config
        self.max_len = max_len
        self.length = 0
        self.backend = select_backend(backend, config, device, dtype)
        blocks_each = -(-max_len // _BLOCK_SIZE)
        self.cache = PagedKVCache.allocate(
            config,
            self.backend.block_shape,
            num_blocks=batch_size * blocks_each,
            block_size=_BLOCK_SIZE,
            dtype=dtype,
            device=device,
        )
        blocks = torch.arange(batch_size * blocks_each, dtype=torch.int32, device=device)
        self.block_tables = blocks.view(batch_size, blocks_each)

    def extend(self, num_tokens: int) -> tuple[Tensor, PagedBatch]:
        """Make room for that many more tokens in each row: their positions [B * T] and the batch to run."""
        start, end = self.length, self.length + num_tokens
        if end > self.max_len:
            raise ConfigError(f"{end} tokens do not fit a cache of {self.max_len}; ask for a larger max_len")
        self.length = end
        batch_size = self.block_tables.shape[0]
        device = self.block_tables.device
        positions = torch.arange(start, end, device=device)
        slots = self.block_tables[:, positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.arange(0, (batch_size + 1) * num_tokens, num_tokens, dtype=torch.int32, device=device),
            context_lens=torch.full((batch_size,), end, dtype=torch.int32, device=device),
            block_tables=self.block_tables,
            slot_mapping=slots.flatten(),
            num_tokens=batch_size * num_tokens,
            max_query_len=num_tokens,
            max_context_len=end,
        )
        batch = PagedBatch(self.backend, self.cache, metadata, self.config.sliding_window)
        return positions.repeat(batch_size), batch

    def select_rows(self, rows: Tensor) -> None:
        """Replace the sequences by those at `rows` [B] int64, of which any may come several times or not at all."""
        blocks_each = self.block_tables.shape[1]

        def select(blocks: Tensor) -> Tensor:
            return blocks.unflatten(0, (-1, blocks_each)).index_select(0, rows).flatten(0, 1)

        num_blocks = rows.shape[0] * blocks_each
        self.cache = PagedKVCache(
            [select(blocks) for blocks in self.cache.keys],
            [select(blocks) for blocks in self.cache.values],
            num_blocks,
            self.cache.block_size,
        )
        blocks = torch.arange(num_blocks, dtype=torch.int32, device=self.block_tables.device)
        self.block_tables = blocks.view(-1, blocks_each)
