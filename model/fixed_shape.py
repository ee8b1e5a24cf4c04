"""Products of one fixed shape on a GPU: a row's result then does not depend on how many rows a step has.

cuBLAS chooses a kernel, and with it the order in which a sum is added, by the shape of a product. Cut and filled up to
blocks of `ROWS` rows, every product of a layer has the same shape in every step, so the same kernel runs. What is left
to cuBLAS is that this kernel treats all rows of a block alike: kernels with one order for every tile do, one that hands
parts of a sum to whichever processor is free would not. The engine's start-up check tells.

The price: a step of one sequence multiplies `ROWS` rows, of which the memory's speed hides most, and a step of
thousands of tokens runs many products of a size that does not fill a large card.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import Activation
from model.linear import Linear, activate
from model.transformer import Transformer

ROWS = 128


class FixedShapeProduct:
    """act(x @ weight.T + bias) for x [..., in], in products of exactly `rows` rows."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None, rows: int = ROWS
    ) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.activation: Activation | None = activation
        self.rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        count = flat.shape[0]
        blocks = -(-count // self.rows)
        # Always a copy of its own: a view's alignment could make cuBLAS choose another kernel.
        padded = flat.new_zeros(blocks * self.rows, flat.shape[1])
        padded[:count] = flat
        out = flat.new_empty(blocks * self.rows, self.weight.shape[0])
        for block in range(blocks):
            part = slice(block * self.rows, (block + 1) * self.rows)
            out[part] = F.linear(padded[part], self.weight, self.bias)
        return activate(out[:count], self.activation).view(*x.shape[:-1], -1)


def fix_product_shapes(model: Transformer, rows: int = ROWS) -> None:
    """Let all of the model's products have one shape each. For inference only; the weights stay where they are.

    Reduced-precision sums in float16 and bfloat16, which cuBLAS may split, are switched off in the whole process.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    for module in model.modules():
        if isinstance(module, Linear):
            module.packed = FixedShapeProduct(module.weight, module.bias, module.activation, rows)
    if model.lm_head is None:
        model.use_head(FixedShapeProduct(model.embed_tokens.weight, rows=rows))
