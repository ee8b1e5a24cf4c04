"""Causal attention of whole sequences, as training runs it: the compiled CPU kernel, or torch's own.

The kernel (model/native/dense_attention.h) keeps no weights for the backward pass and makes dropout's mask again from a
seed, which is drawn from torch's default generator.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.dropout import draw_seed, drop_below
from model.errors import ConfigError
from model.native import load_kernels

_TILE = 16


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each token over itself and those before it: [B, T, H, d] from k, v [B, T, K, d].

    `window` is how many tokens a token sees, itself included. `dropout` is the probability that a weight is dropped.
    """
    if _kernel_can_run(q, k, v):
        out: Tensor = _CausalAttention.apply(q, k, v, window or 0, dropout)
        return out
    return _torch_attention(q, k, v, window, dropout)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout: float) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    length = q.shape[2]
    mask = None
    if window is not None and window < length:
        offset = torch.arange(length, device=q.device)
        distance = offset[:, None] - offset[None, :]
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _kernel_can_run(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        not q.is_cuda
        and not torch.compiler.is_compiling()
        and type(q) is Tensor
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] % _TILE == 0
        and load_kernels() is not None
    )


class _DenseStep(ctypes.Structure):
    """`dense_step` of model/native/training.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "log_sums")),
        *((name, ctypes.c_void_p) for name in ("output_grad", "query_grad", "key_grad", "value_grad")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("query", "key", "value", "output")),
        *((f"{name}_grad_stride", ctypes.c_int64) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "num_heads", "num_kv_heads", "head_dim", "window")),
        ("seed", ctypes.c_uint64),
        ("scale", ctypes.c_float),
        ("keep_scale", ctypes.c_float),
        ("drop_below", ctypes.c_uint32),
        ("is_bfloat16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        batch, length, heads, _ = q.shape
        log_sums = torch.empty(batch, heads, length)
        ctx.window, ctx.dropout, ctx.seed = window, dropout, draw_seed() if dropout else 0
        _run(_step(q, k, v, out, log_sums, window, dropout, ctx.seed))
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        output_grad = output_grads[0].contiguous()
        step = _step(q, k, v, out, log_sums, ctx.window, ctx.dropout, ctx.seed)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        step.output_grad = output_grad.data_ptr()
        step.query_grad, step.key_grad, step.value_grad = (grad.data_ptr() for grad in grads)
        step.query_grad_stride, step.key_grad_stride, step.value_grad_stride = (grad.stride(1) for grad in grads)
        _run(step)
        return (*grads, None, None)


def _step(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, window: int, dropout: float, seed: int
) -> _DenseStep:
    batch, length, heads, head_dim = q.shape
    return _DenseStep(
        query=q.data_ptr(), key=k.data_ptr(), value=v.data_ptr(), output=out.data_ptr(), log_sums=log_sums.data_ptr(),
        query_stride=q.stride(1), key_stride=k.stride(1), value_stride=v.stride(1), output_stride=out.stride(1),
        batch=batch, length=length, num_heads=heads, num_kv_heads=k.shape[2], head_dim=head_dim, window=window,
        seed=seed, scale=head_dim**-0.5, keep_scale=1.0 / (1.0 - dropout), drop_below=drop_below(dropout),
        is_bfloat16=q.dtype == torch.bfloat16, num_threads=torch.get_num_threads(),
    )  # fmt: skip


def _run(step: _DenseStep) -> None:
    library = load_kernels()
    assert library is not None
    if ctypes.sizeof(_DenseStep) != library.quill_dense_step_size():
        raise ConfigError("the compiled CPU kernels are of another version; run make install")
    if library.quill_dense_attention(ctypes.byref(step)) != 0:
        raise MemoryError("no memory for the attention kernel's workspace")


def _rows(x: Tensor) -> Tensor:
    """x [B, T, heads, d] with its heads side by side and its tokens evenly spaced through the whole batch."""
    _, length, heads, head_dim = x.shape
    even = x.stride(3) == 1 and x.stride(2) == head_dim and x.stride(0) == length * x.stride(1)
    return x if even and x.stride(1) >= heads * head_dim else x.contiguous()
