"""Weights packed once for oneDNN's CPU kernels, through the operators that torch's own freezing uses.

The operators are private to torch, so each packed weight is checked against `F.linear` when it is made, and a
machine or a torch build where they are absent or wrong falls back to `F.linear`.

Rows never depend on each other here, to the bit, as long as there are at least two of them: with a single row
oneDNN may split a long inner dimension over threads and add in another order. A single row is therefore repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import Activation

# oneDNN picks the layout for about this many rows; decoding works with few, prefill with hundreds.
_ROWS_HINT = 32
# Fewer rows than this take longer than this many: there oneDNN uses a slower kernel.
MIN_ROWS = 4
_FUSED: dict[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
# The self-check compares few rows of a random input; bfloat16 keeps 8 bits of each result, and sums of
# thousands of terms in another order may differ by a few of the last.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class PackedWeight:
    """A weight [out, in] in oneDNN's layout with its bias and activation; call with x [..., in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self.post_op, self.algorithm = _FUSED[activation]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if rows == 1:
            return self._product(x.reshape(1, -1).repeat(MIN_ROWS, 1))[:1].view(*x.shape[:-1], self.out_features)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.post_op, [], self.algorithm)


def pack_weight(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> PackedWeight | None:
    """Pack a CPU weight in float32 or bfloat16; None where that is not possible or fails its check."""
    if weight.device.type != "cpu" or weight.dtype not in _TOLERANCE or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = PackedWeight(weight, bias, activation)
        return packed if _agrees(packed, weight, bias, activation) else None
    except (RuntimeError, AttributeError, NotImplementedError):
        return None


def _agrees(packed: PackedWeight, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> bool:
    from model.linear import activate

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=generator).to(weight.dtype)
    expected = activate(F.linear(x, weight, bias), activation).float()
    scale = expected.abs().max().clamp(min=1e-6)
    return bool(((packed(x).float() - expected).abs().max() / scale) <= _TOLERANCE[weight.dtype])
