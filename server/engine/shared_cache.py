"""One KV cache for several models: memory that any of them can use up to the last byte, in blocks of one size.

The memory is cut into units of equal size, and a block is a unit whichever model holds it; so one block manager hands
them out, and a free block is free for everybody. A unit is as large as the largest model's block. A smaller model puts
more tokens into it: its block size is a multiple of the configured one.

No kernel knows of this. To a model, the memory is a row of slots, each of one layer's keys or values of one block:
what it calls block n has its keys of layer l in slot n + l and its values in slot n + L + l. These caches are
contiguous and overlap; `numbers` says which n lies at the start of each unit, and no other is used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.backends import select_backend
from model.checkpoint import load_config
from model.config import ModelConfig
from model.errors import ConfigError
from model.kv_cache import PagedKVCache
from server.engine.config import EngineConfig
from server.engine.sizing import (
    EngineLimits,
    affordable_memory,
    resolve_batch,
    resolve_device,
    resolve_dtype,
    resolve_threads,
)

# A prefix is reused in whole blocks, so that the blocks of a small model beside a large one are not to grow without
# end: at most eight times the configured size. Triton's kernels are fastest with powers of two.
_FACTORS = {"cpu": range(1, 9), "cuda": (1, 2, 4, 8)}
# Full contexts of each model that the cache holds unless told otherwise, as for one model.
_CONTEXTS = 64


@dataclass(frozen=True, slots=True)
class CacheRoom:
    """A runner's part of a cache that exists already: of one that models share, or of the weights it replaces."""

    cache: PagedKVCache
    limits: EngineLimits


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A model's block: `slot_bytes` for the keys of one layer, as many for its values, `num_slots` of these."""

    block_size: int
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    slot_bytes: int
    num_slots: int

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes


def unit_bytes(layouts: list[BlockLayout]) -> int:
    """The smallest unit that holds a block of each, whose slots lie at multiples of their own size."""
    unit = max(layout.num_bytes for layout in layouts)
    if all(unit % layout.slot_bytes == 0 for layout in layouts):
        return unit
    return max(layout.num_bytes + layout.slot_bytes for layout in layouts)


def first_slots(layout: BlockLayout, unit: int, num_units: int) -> np.ndarray:
    """The first whole slot in each unit [num_units], which is the model's number of the block there."""
    return -(-np.arange(num_units, dtype=np.int64) * unit // layout.slot_bytes).astype(np.int32)


def share_cache(configs: list[EngineConfig]) -> list[tuple[EngineConfig, CacheRoom]]:
    """For each model its part of one cache, and its configuration with the block size and the threads that it gets.

    Raises ConfigError if their contexts do not fit the memory, or for models that cannot share.
    """
    device = resolve_device(configs[0].device)
    dtype = resolve_dtype(configs[0].dtype, device)
    models = [load_config(config.model_path) for config in configs]
    threads = [resolve_threads(config.num_threads, model) for config, model in zip(configs, models, strict=True)]
    contexts = [_context(config, model) for config, model in zip(configs, models, strict=True)]
    layouts = _layouts(configs, models, contexts, device, dtype)
    unit = unit_bytes(layouts)
    needed = [-(-context // layout.block_size) for context, layout in zip(contexts, layouts, strict=True)]
    num_units = _num_units(configs[0], needed, unit, device)
    arena = _allocate(num_units * unit, dtype, device)
    max_num_seqs, max_num_batched_tokens = resolve_batch(configs[0], device)
    parts = []
    for index, layout in enumerate(layouts):
        limits = EngineLimits(max_num_seqs, max_num_batched_tokens, contexts[index], layout.block_size, num_units)
        config = dataclasses.replace(configs[index], block_size=layout.block_size, num_threads=threads[index])
        parts.append((config, CacheRoom(_view(arena, layout, unit, num_units), limits)))
    return parts


def _context(config: EngineConfig, model: ModelConfig) -> int:
    """`max_model_len` bounds each model's context; only one model is told that its own is shorter."""
    return min(config.max_model_len or model.max_seq_len, model.max_seq_len)


def _layouts(
    configs: list[EngineConfig],
    models: list[ModelConfig],
    contexts: list[int],
    device: torch.device,
    dtype: torch.dtype,
) -> list[BlockLayout]:
    """Those of the configured block size, or of a multiple: the largest that fits the largest model's block."""
    pairs = list(zip(configs, models, strict=True))
    layouts = [_layout(config, model, config.block_size, device, dtype) for config, model in pairs]
    largest = max(layout.num_bytes for layout in layouts)
    result = []
    for (config, model), layout, context in zip(pairs, layouts, contexts, strict=True):
        most = min(largest // layout.num_bytes, -(-context // layout.block_size))
        factor = max(factor for factor in _FACTORS[device.type] if factor <= max(1, most))
        result.append(_layout(config, model, factor * layout.block_size, device, dtype))
    return result


def _layout(
    config: EngineConfig, model: ModelConfig, block_size: int, device: torch.device, dtype: torch.dtype
) -> BlockLayout:
    backend = select_backend(
        config.attention_backend, model, device, dtype, block_size, deterministic=config.deterministic
    )
    key_shape, value_shape = backend.block_shape(model, block_size, dtype)
    slot_bytes = torch.Size(key_shape).numel() * dtype.itemsize
    if torch.Size(value_shape).numel() * dtype.itemsize != slot_bytes:
        raise ConfigError(
            f"model {config.model_name} cannot share a KV cache: its head_dim of {model.head_dim} is no multiple of 16;"
            " serve it alone, or with attention_backend torch"
        )
    return BlockLayout(block_size, key_shape, value_shape, slot_bytes, 2 * model.num_layers)


def _num_units(config: EngineConfig, needed: list[int], unit: int, device: torch.device) -> int:
    """`needed` is how many blocks a context of each model takes. Raises ConfigError if one has no room."""
    least = max(needed)
    if config.kv_cache_memory is None:
        return max(least, min(_CONTEXTS * least, affordable_memory(device) // unit))
    num_units = config.kv_cache_memory // unit
    if num_units < least:
        memory = -(-least * unit // 2**20)
        raise ConfigError(
            f"kv_cache_memory must be at least {memory}MiB to hold one context of each of these models; or lower"
            " max_model_len"
        )
    return num_units


def _allocate(num_bytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: what was never written must be numbers. Bytes that another model wrote are numbers of the same dtype."""
    try:
        return torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
    except (RuntimeError, MemoryError):
        # torch reports a failed allocation on the CPU as a bare RuntimeError.
        size = num_bytes / 2**30
        raise ConfigError(f"kv_cache_memory asks for {size:.1f}GiB, which cannot be had here; lower it") from None


def _view(arena: Tensor, layout: BlockLayout, unit: int, num_units: int) -> PagedKVCache:
    """A model's caches over the arena, from layer to layer one slot further."""
    slots = arena.nbytes // layout.slot_bytes
    flat = arena[: slots * layout.slot_bytes // arena.itemsize]
    keys, values = flat.view(slots, *layout.key_shape), flat.view(slots, *layout.value_shape)
    num_layers = layout.num_slots // 2
    return PagedKVCache(
        keys=[keys[layer:] for layer in range(num_layers)],
        values=[values[num_layers + layer :] for layer in range(num_layers)],
        num_blocks=num_units,
        block_size=layout.block_size,
        numbers=first_slots(layout, unit, num_units),
    )
