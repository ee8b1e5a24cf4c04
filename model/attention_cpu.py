"""Paged attention on the CPU: the compiled kernel of model/native, which reads blocks in place.

Its output rows do not depend, to the bit, on what else is in the step: see model/native/paged_attention.h.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import ConfigError
from model.native import load_kernels
from model.paged_attention import AttentionMetadata

# Tokens in a tile of the cache: one AVX-512 register of float32 lanes.
_TILE = 16
_NO_MEMORY = -1


class _AttentionStep(ctypes.Structure):
    """`attention_step` of model/native/kernels.c, field for field."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("key_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("num_seqs", ctypes.c_int64),
        ("max_blocks", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("is_bfloat16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class NativeBackend:
    """The compiled kernel, for float32 and bfloat16 and an even head_dim. `supports` says whether it can run."""

    name = "native"

    def __init__(self) -> None:
        library = load_kernels()
        if library is None:
            raise RuntimeError("the native kernels were not built")
        if ctypes.sizeof(_AttentionStep) != library.quill_step_size():
            raise ConfigError("the compiled CPU kernels are of another version; run make install")
        self._run = library.quill_paged_attention

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype) -> bool:
        fits = dtype in (torch.float32, torch.bfloat16) and config.head_dim % 2 == 0
        return fits and load_kernels() is not None

    def block_shape(
        self, config: ModelConfig, block_size: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tiles of 16 tokens for each kv head; the kernel's header describes what lies inside a tile.

        Raises ConfigError for a block that is not made of whole tiles.
        """
        tiles, rest = divmod(block_size, _TILE)
        if rest or tiles == 0:
            raise ConfigError(f"block_size must be a multiple of {_TILE} on the CPU, or attention_backend be torch")
        padded_dim = -(-config.head_dim // _TILE) * _TILE
        heads = config.num_kv_heads
        return (heads, tiles, config.head_dim * _TILE), (heads, tiles, _TILE * padded_dim)

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
        _, num_heads, head_dim = q.shape
        assert q.dtype == k.dtype == v.dtype == key_cache.dtype == value_cache.dtype, "one dtype throughout"
        q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[metadata.num_tokens :] = 0
        step = _AttentionStep(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            metadata.cu_seqlens_q.data_ptr(),
            metadata.context_lens.data_ptr(),
            metadata.block_tables.data_ptr(),
            metadata.context_lens.shape[0],
            metadata.block_tables.stride(0),
            num_heads,
            k.shape[1],
            head_dim,
            key_cache.shape[2] * _TILE,
            window or 0,
            head_dim**-0.5,
            q.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        status = self._run(ctypes.byref(step))
        if status == _NO_MEMORY:
            raise MemoryError("no memory for the attention kernel's workspace")
        assert status == 0, "caches must lie on 64 bytes, and a context hold its queries"
        return out


def _dense_heads(x: Tensor) -> Tensor:
    """x [N, heads, d] with heads and dimensions adjacent in memory; only the token stride is free."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
