"""Operations of a training step on the CPU that are one pass over memory each, forwards and backwards.

torch computes an activation, an RMS norm or a rotation in several passes and keeps what lies between them; on the CPU
of a small model that is a fifth of a step. The kernels (model/native/elementwise.c) run only where a gradient will be
asked for: serving and evaluation keep torch's operators.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from model.config import Activation
from model.errors import ConfigError
from model.native import load_kernels

_TILE = 16
_NORM_CHUNK = 64
_ACTIVATE, _ACTIVATE_BACK, _ROTATE, _NORM, _NORM_BACK = range(5)
_KINDS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def can_activate(x: Tensor, activation: Activation) -> bool:
    """bfloat16 only: float32 has more digits than the kernel's error function."""
    return activation in _KINDS and x.dtype == torch.bfloat16 and x.shape[-1] % (2 * _TILE) == 0 and _trains_here(x)


def activation(x: Tensor, name: Activation) -> Tensor:
    """The activation of each element."""
    out: Tensor = _Activation.apply(x, _KINDS[name], False)
    return out


def gated_activation(gate_up: Tensor, name: Activation) -> Tensor:
    """act(gate) * up for gate_up [..., 2 I], gate first: [..., I]."""
    out: Tensor = _Activation.apply(gate_up, _KINDS[name], True)
    return out


def can_normalise(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.shape[-1] % _TILE == 0 and _trains_here(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of float32 x; the result is bfloat16 under autocast to it."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    out: Tensor = _RMSNorm.apply(x, weight, eps, torch.bfloat16 if autocast else torch.float32)
    return out


def can_rotate(x: Tensor, cos: Tensor) -> bool:
    """Whole sequences [B, T, heads, d] whose positions are 0 … T - 1, the rows of cos [T, 1, d]."""
    return (
        x.dim() == 4
        and x.dtype in (torch.float32, torch.bfloat16)
        and cos.dtype == torch.float32
        and cos.shape == (x.shape[1], 1, x.shape[3])
        and cos.stride(2) == 1
        and x.shape[3] % (2 * _TILE) == 0
        and (x.stride(3), x.stride(2)) == (1, x.shape[3])
        and x.stride(0) == x.shape[1] * x.stride(1)
        and _trains_here(x)
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`model.layers.apply_rotary` of whole sequences; the angles get no gradient."""
    out: Tensor = _Rotation.apply(x, cos, sin)
    return out


def _trains_here(x: Tensor) -> bool:
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and load_kernels() is not None
    )


class _Elementwise(ctypes.Structure):
    """`elementwise` of model/native/elementwise.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "output_grad", "output", "weight", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("scales", "weight_grads")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "input_stride", "num_heads", "length")),
        ("angle_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("sign", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("operation", "kind", "gated", "is_bfloat16", "num_threads")),
    ]


def _run(call: _Elementwise) -> None:
    library = load_kernels()
    assert library is not None
    if ctypes.sizeof(_Elementwise) != library.quill_elementwise_size():
        raise ConfigError("the compiled CPU kernels are of another version; run make install")
    call.num_threads = torch.get_num_threads()
    library.quill_elementwise(ctypes.byref(call))


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int, gated: bool) -> Tensor:
        x = x.contiguous()
        columns = x.shape[-1] // (2 if gated else 1)
        out = x.new_empty(*x.shape[:-1], columns)
        ctx.save_for_backward(x)
        ctx.kind, ctx.gated = kind, gated
        _run(_activation_call(_ACTIVATE, x, out, columns, kind, gated))
        return out

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        output_grad = output_grads[0].contiguous()
        grad = torch.empty_like(x)
        call = _activation_call(_ACTIVATE_BACK, x, grad, output_grad.shape[-1], ctx.kind, ctx.gated)
        call.output_grad = output_grad.data_ptr()
        _run(call)
        return grad, None, None


def _activation_call(operation: int, x: Tensor, out: Tensor, columns: int, kind: int, gated: bool) -> _Elementwise:
    return _Elementwise(
        operation=operation, input=x.data_ptr(), output=out.data_ptr(), rows=x.numel() // x.shape[-1], columns=columns,
        kind=kind, gated=gated, is_bfloat16=x.dtype == torch.bfloat16,
    )  # fmt: skip


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x, dtype=dtype)
        scales = torch.empty(x.shape[:-1])
        ctx.save_for_backward(x, weight, scales)
        _run(_norm_call(_NORM, x, weight, scales, out, dtype, eps))
        return out

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        output_grad, grad = output_grads[0].contiguous(), torch.empty_like(x)
        call = _norm_call(_NORM_BACK, x, weight, scales, grad, output_grad.dtype, 0.0)
        parts = torch.empty(-(-call.rows // _NORM_CHUNK), x.shape[-1])
        call.output_grad, call.weight_grads = output_grad.data_ptr(), parts.data_ptr()
        _run(call)
        return grad, parts.sum(0), None, None


def _norm_call(
    operation: int, x: Tensor, weight: Tensor, scales: Tensor, out: Tensor, dtype: torch.dtype, eps: float
) -> _Elementwise:
    """`dtype` is that of the norm's result and of the result's gradient."""
    return _Elementwise(
        operation=operation, input=x.data_ptr(), weight=weight.data_ptr(), scales=scales.data_ptr(),
        output=out.data_ptr(), rows=scales.numel(), columns=x.shape[-1], eps=eps, is_bfloat16=dtype == torch.bfloat16,
    )  # fmt: skip


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(output_grads[0].contiguous(), cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    batch, length, heads, head_dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(_Elementwise(
        operation=_ROTATE, input=x.data_ptr(), output=out.data_ptr(), cosine=cos.data_ptr(), sine=sin.data_ptr(),
        rows=batch * length, columns=head_dim, input_stride=x.stride(1), num_heads=heads, length=length,
        angle_stride=cos.stride(0), sign=sign, is_bfloat16=x.dtype == torch.bfloat16,
    ))  # fmt: skip
    return out
