"""Low-rank adapters (LoRA, Hu et al. 2021): W x becomes W x + (alpha / rank) B A x, and only A and B are trained.

A [rank, in] begins with random values and B [out, rank] with zeros, so the model begins as it was. The layers' products
get one each; q, k and v, which are one product here, share the rows of A. Checkpoints hold W + (alpha / rank) B A under
the weight's name and load anywhere; the state of a run holds W, A and B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.linear import Linear, activate
from model.transformer import Transformer
from training.config import TrainSection

_DOWN, _UP = ".lora_down", ".lora_up"


class AdaptedLinear(Linear):
    """A Linear whose own weight and bias are frozen, with an adapter beside them."""

    def __init__(self, linear: Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.activation, self.packed = linear.weight, linear.bias, linear.activation, None
        self.scale = scale
        out_features, in_features = linear.weight.shape
        bound = 1.0 / math.sqrt(in_features)
        # As the paper's own code begins: uniform, like torch's linear layers.
        self.lora_down = nn.Parameter(torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator))
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_down), self.lora_up)
        return activate(F.linear(x, self.weight, self.bias) + self.scale * update, self.activation)


def adapter_scale(settings: TrainSection) -> float:
    """0 without adapters."""
    return settings.lora_alpha / settings.lora_rank if settings.lora_rank else 0.0


def add_adapters(model: Transformer, settings: TrainSection) -> None:
    """Freezes the model, which must be whole and on the CPU, and gives each product of its layers an adapter.

    `train.seed` decides the adapters' first values.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(settings.seed)
    linears = [(name, module) for name, module in model.layers.named_modules() if isinstance(module, Linear)]
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        adapted = AdaptedLinear(linear, settings.lora_rank, adapter_scale(settings), generator)
        setattr(model.layers.get_submodule(parent), child, adapted.train(linear.training))


def merge_adapters(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with each adapter added to its weight; without adapters, the same tensors."""
    merged = {name: tensor for name, tensor in tensors.items() if not name.endswith((_DOWN, _UP))}
    for name, down in tensors.items():
        if name.endswith(_DOWN):
            owner = name.removesuffix(_DOWN)
            weight = f"{owner}.weight"
            merged[weight] = torch.addmm(tensors[weight], tensors[owner + _UP], down, alpha=scale)
    return merged
