"""Linear: a product with an optional activation behind it, which a packed CPU form may fuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import fused
from model.config import Activation
from model.packed_linear import pack_weight

Product = Callable[[Tensor], Tensor]
"""Another way to compute a layer: x [..., in] to act(x @ weight.T + bias) [..., out]."""


class Linear(nn.Module):
    """act(x @ weight.T + bias) for x [..., in]; weight [out, in].

    `pack()` replaces the weight by a form laid out for this machine's CPU. A packed module computes the same
    function for inference only: its weight can no longer be read, trained or saved.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, activation: Activation | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.activation = activation
        self.packed: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed(x)
        return activate(F.linear(x, self.weight, self.bias), self.activation)

    def pack(self) -> None:
        packed = pack_weight(self.weight.detach(), self.bias, self.activation)
        if packed is not None:
            self.packed = packed
            # A new tensor: a view of no rows would keep the whole weight in memory.
            self.weight = nn.Parameter(self.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """The activation by name, or x itself."""
    if activation is not None and fused.can_activate(x, activation):
        return fused.activation(x, activation)
    match activation:
        case None:
            return x
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
        case "silu":
            return F.silu(x)
