"""PagedKVCache: keys and values of all layers in fixed-size blocks, in the layout that the backend asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import ConfigError

BlockShape = Callable[[ModelConfig, int, torch.dtype], tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class PagedKVCache:
    """`keys[layer]` and `values[layer]` are [num_blocks, *block shape of the backend].

    Where several models share the memory they are longer, and only the blocks `numbers` [num_blocks] of them are this
    model's: block i of those that are handed out is `numbers[i]` to the kernels.
    """

    keys: list[Tensor]
    values: list[Tensor]
    num_blocks: int
    block_size: int
    numbers: np.ndarray | None = None

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        block_shape: BlockShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> PagedKVCache:
        """Zeroed blocks for every layer. `block_shape` gives the shapes of one block's keys and values.

        Raises ConfigError if the device has not that much memory.
        """
        key_shape, value_shape = block_shape(config, block_size, dtype)
        layers = range(config.num_layers)
        try:
            keys = [torch.zeros(num_blocks, *key_shape, dtype=dtype, device=device) for _ in layers]
            values = [torch.zeros(num_blocks, *value_shape, dtype=dtype, device=device) for _ in layers]
        except (RuntimeError, MemoryError):
            # torch reports a failed allocation on the CPU as a bare RuntimeError.
            size = num_blocks * bytes_per_block(config, block_shape, block_size, dtype) / 2**30
            raise ConfigError(f"kv_cache_memory asks for {size:.1f}GiB, which cannot be had here; lower it") from None
        return cls(keys, values, num_blocks, block_size)


def bytes_per_block(config: ModelConfig, block_shape: BlockShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values together."""
    key_shape, value_shape = block_shape(config, block_size, dtype)
    elements = torch.Size(key_shape).numel() + torch.Size(value_shape).numel()
    return config.num_layers * elements * dtype.itemsize
