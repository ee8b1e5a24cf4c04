"""Paged attention on CUDA: Triton kernels, and torch's own variable-length attention where it can read blocks.

Nothing here waits for the device or depends on tensors' values, so that all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from model.attention_check import check_backend
from model.config import ModelConfig
from model.errors import ConfigError
from model.paged_attention import AttentionBackend, AttentionMetadata, TorchBackend

logger = logging.getLogger(__name__)

# A context is cut into splits of at least this many keys, and into at most so many splits: one sequence alone then
# keeps a card busy, while the splits' results stay small beside the keys and values that were read.
_MIN_SPLIT = 256
_MAX_SPLITS = 32
# Bytes of a tile of queries, and of one of keys or of values: with two or three stages they fit any recent card.
_QUERY_TILE_BYTES = 32 * 1024
_KEY_TILE_BYTES = 16 * 1024
_STORE_TILE = 1024
# The least rows of a matrix product on tensor cores.
_MIN_ROWS = 16
# FlashAttention-2, which torch brings, takes blocks of a multiple of this.
_VARLEN_BLOCK = 256


class BackendUnavailableError(Exception):
    """Why a backend cannot run here."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes and launch options of the kernels for one kind of head."""

    head_pad: int
    group_pad: int
    decode_rows: int
    prefill_tokens: int
    tile: int
    precision: str
    num_stages: int
    prefill_warps: int

    @classmethod
    def choose(cls, head_dim: int, group: int, dtype: torch.dtype) -> Tiling:
        """For `group` query heads per kv head."""
        head_pad = max(16, _power_of_two(head_dim))
        group_pad = _power_of_two(group)
        row_bytes = head_pad * dtype.itemsize
        exact = dtype == torch.float32
        # Exact float32 products run on plain cores, where large tiles would only spill registers.
        query_rows = min(32 if exact else 128, _QUERY_TILE_BYTES // row_bytes)
        return cls(
            head_pad=head_pad,
            group_pad=group_pad,
            decode_rows=max(_MIN_ROWS, group_pad),
            prefill_tokens=max(1, query_rows // group_pad),
            tile=max(16, min(32 if exact else 64, _KEY_TILE_BYTES // row_bytes)),
            precision="ieee" if exact else "tf32",
            num_stages=3 if row_bytes <= 128 else 2,
            prefill_warps=4 if exact and head_pad < 128 else 8,
        )


class TritonBackend:
    """Our own kernels, for float32, bfloat16 and float16 and head_dim up to 256.

    A row is bit-invariant to what else is in the step. With `deterministic` it is also the same whether its token is
    decoded or computed in a chunk: one kernel with fixed tiles then takes all rows and never splits the keys, so that
    few sequences of long contexts keep only a few of a card's processors busy (one per sequence and kv head).
    Raises BackendUnavailableError without triton.
    """

    name = "triton"

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, deterministic: bool = False) -> None:
        if config.head_dim > 256:
            raise BackendUnavailableError("head_dim is above 256")
        self._kernels = _load_kernels()
        self._deterministic = deterministic
        group = config.num_heads // config.num_kv_heads
        self._tiling = tiling = Tiling.choose(config.head_dim, group, dtype)
        self._scale = math.log2(math.e) * config.head_dim**-0.5
        self._store_shape = {"NUM_KV_HEADS": config.num_kv_heads, "HEAD_DIM": config.head_dim, "TILE": _STORE_TILE}
        self._shape = {
            "NUM_KV_HEADS": config.num_kv_heads,
            "GROUP": group,
            "HEAD_DIM": config.head_dim,
            "HEAD_PAD": tiling.head_pad,
            "TILE": tiling.tile,
            "PRECISION": tiling.precision,
        }
        self._splits = {"TILE": tiling.tile, "MIN_SPLIT": _MIN_SPLIT, "MAX_SPLITS": _MAX_SPLITS}

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
        q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
        self._store(k, v, key_cache, value_cache, metadata.slot_mapping)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[metadata.num_tokens :] = 0
        if metadata.max_query_len > 1 or self._deterministic:
            self._prefill(out, q, key_cache, value_cache, metadata, window)
        if not self._deterministic and (metadata.max_query_len == 1 or not _all_rows_alike(metadata)):
            self._decode(out, q, key_cache, value_cache, metadata, window)
        return out

    def _store(self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
        num_tokens, num_kv_heads, head_dim = k.shape
        grid = (num_tokens, -(-num_kv_heads * head_dim // _STORE_TILE))
        self._kernels.store_kernel[grid](
            k,
            v,
            key_cache,
            value_cache,
            slot_mapping,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            **self._store_shape,
        )

    def _prefill(
        self,
        out: Tensor,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        window: int | None,
    ) -> None:
        tiling, num_seqs = self._tiling, metadata.context_lens.shape[0]
        grid = (metadata.num_tokens // tiling.prefill_tokens + num_seqs, key_cache.shape[2])
        self._kernels.prefill_kernel[grid](
            out,
            q,
            key_cache,
            value_cache,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.block_tables,
            q.stride(0),
            q.stride(1),
            metadata.block_tables.stride(0),
            num_seqs,
            self._scale,
            GROUP_PAD=tiling.group_pad,
            BLOCK_SIZE=key_cache.shape[1],
            WINDOW=window or 0,
            TOKENS=tiling.prefill_tokens,
            SINGLES=self._deterministic,
            num_warps=tiling.prefill_warps,
            num_stages=tiling.num_stages,
            **self._shape,
        )

    def _decode(
        self,
        out: Tensor,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        window: int | None,
    ) -> None:
        num_seqs, (_, num_heads, head_dim) = metadata.context_lens.shape[0], q.shape
        # Never fewer than a sequence needs: see _split_length in the kernels. More only end at once.
        longest = min(metadata.max_context_len, window or metadata.max_context_len)
        splits = min(_MAX_SPLITS, max(1, -(-longest // _MIN_SPLIT)))
        direct = splits == 1
        pieces = (0,) if direct else (num_seqs, num_heads, splits)
        partial = torch.empty(*pieces, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(pieces, dtype=torch.float32, device=q.device)
        self._kernels.decode_kernel[(num_seqs, key_cache.shape[2], splits)](
            out,
            partial,
            partial_lse,
            q,
            key_cache,
            value_cache,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.block_tables,
            q.stride(0),
            q.stride(1),
            metadata.block_tables.stride(0),
            splits,
            self._scale,
            BLOCK_SIZE=key_cache.shape[1],
            WINDOW=window or 0,
            ROWS=self._tiling.decode_rows,
            DIRECT=direct,
            num_stages=self._tiling.num_stages,
            **self._shape | self._splits,
        )
        if not direct:
            self._kernels.combine_kernel[(num_seqs, num_heads)](
                out,
                partial,
                partial_lse,
                metadata.cu_seqlens_q,
                metadata.context_lens,
                splits,
                NUM_HEADS=num_heads,
                HEAD_DIM=head_dim,
                HEAD_PAD=self._tiling.head_pad,
                WINDOW=window or 0,
                **self._splits,
            )


class VarlenBackend(TritonBackend):
    """Torch's variable-length attention (FlashAttention-2) for steps with prompts; decodes as TritonBackend.

    For bfloat16 and float16. Raises BackendUnavailableError where torch or the sizes do not allow it.
    """

    name = "varlen"

    def __init__(self, config: ModelConfig, dtype: torch.dtype, block_size: int) -> None:
        super().__init__(config, dtype)
        if dtype == torch.float32:
            raise BackendUnavailableError("it does not compute in float32")
        if block_size % _VARLEN_BLOCK:
            raise BackendUnavailableError(f"block_size is not a multiple of {_VARLEN_BLOCK}")
        self._varlen_attn = _load_varlen_attn()

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
        if metadata.max_query_len == 1:
            return super().attend(q, k, v, key_cache, value_cache, metadata, window)
        q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
        self._store(k, v, key_cache, value_cache, metadata.slot_mapping)
        out: Tensor = self._varlen_attn(
            q,
            key_cache,
            value_cache,
            metadata.cu_seqlens_q,
            # With a block table the keys' lengths are seqused_k; this must only have the right form.
            metadata.cu_seqlens_q,
            metadata.max_query_len,
            metadata.max_context_len,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[1] != key_cache.shape[2],
            seqused_k=metadata.context_lens,
            block_table=metadata.block_tables,
        )
        out[metadata.num_tokens :] = 0
        return out


def select_cuda_backend(
    name: str,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    *,
    deterministic: bool = False,
) -> AttentionBackend:
    """The backend called `name`, or for "auto" the first that computes what the reference does on this device.

    With `deterministic`, one whose results depend on a token's own context alone. Raises ConfigError if the named one
    does not, or none.
    """
    if deterministic:
        return _select_deterministic(name, config, device, dtype, block_size)
    wanted = ("varlen", "triton") if name == "auto" else (name,)
    for candidate in wanted:
        backend, fault = _try_backend(candidate, config, device, dtype, block_size)
        if backend is not None:
            return backend
        if name != "auto":
            raise ConfigError(f"attention backend {name!r} cannot run here ({fault}); use auto or torch")
        logger.info("attention backend %s is not used: %s", candidate, fault)
    logger.warning("no attention kernel runs on this device; the torch reference is used, which is slow")
    return TorchBackend()


def _select_deterministic(
    name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, block_size: int
) -> AttentionBackend:
    """FlashAttention splits keys as it sees fit and the reference's products vary in shape: only our kernels remain."""
    if name not in ("auto", "triton"):
        raise ConfigError(f"deterministic cannot be had with attention backend {name!r} on CUDA; use auto or triton")
    backend, fault = _try_backend("triton", config, device, dtype, block_size, deterministic=True)
    if backend is None:
        raise ConfigError(f"deterministic needs the triton attention backend, which cannot run here ({fault})")
    return backend


@cache
def _try_backend(
    name: str,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    *,
    deterministic: bool = False,
) -> tuple[AttentionBackend | None, str]:
    """The backend if its results are right, else why not. The check also compiles the kernels, once per process."""
    try:
        backend = (
            VarlenBackend(config, dtype, block_size)
            if name == "varlen"
            else TritonBackend(config, dtype, deterministic=deterministic)
        )
        check_backend(backend, config, device, dtype, block_size)
    except Exception as error:  # a compiler, a driver and a young torch interface: any of them may fail in any way
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return backend, ""


@cache
def _load_kernels() -> ModuleType:
    try:
        from model import triton_kernels
    except ImportError as error:
        raise BackendUnavailableError("triton is not installed") from error
    return triton_kernels


def _load_varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise BackendUnavailableError("this torch has no varlen_attn") from error
    return varlen_attn


def _all_rows_alike(metadata: AttentionMetadata) -> bool:
    return metadata.num_tokens == metadata.context_lens.shape[0] * metadata.max_query_len


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()
