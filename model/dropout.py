"""Dropout whose mask is a function of a seed: on the CPU a compiled kernel, elsewhere torch's own.

torch's dropout on the CPU draws its numbers one by one in one thread and takes longer than the products of a small
model; the kernel (model/native/dropout.h) hashes counters, and makes the mask again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.native import load_kernels


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Each element 0 with `probability`, otherwise divided by 1 - probability; x itself when not training."""
    if not training or probability == 0.0:
        return x
    if _kernel_can_run(x):
        out: Tensor = _Dropout.apply(x, probability, draw_seed())
        return out
    return F.dropout(x, probability)


def draw_seed() -> int:
    """A 63-bit seed from torch's default generator, so that `torch.manual_seed` decides it."""
    return int(torch.randint(1 << 63 - 1, ()).item())


def drop_below(probability: float) -> int:
    """The 32-bit hash below which an element is dropped."""
    return min(round(probability * 2**32), 2**32 - 1)


def _kernel_can_run(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and load_kernels() is not None
    )


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, seed: int) -> Tensor:
        ctx.probability, ctx.seed = probability, seed
        return _apply(x, probability, seed)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(output_grads[0], ctx.probability, ctx.seed), None, None


def _apply(x: Tensor, probability: float, seed: int) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    library = load_kernels()
    assert library is not None
    library.quill_dropout(
        x.data_ptr(), out.data_ptr(), x.numel(), seed, drop_below(probability), 1.0 / (1.0 - probability),
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out
