"""Muon: momentum whose update is made orthogonal, for the matrices inside the layers.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). Written here rather than taken from torch.optim.Muon
because a fused projection holds several matrices that want orthogonalising one by one, because matrices of one shape
go through one batched product, and because ranks share the work.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.distributed import full_tensor, shard_like

# Of the quintic a·x + b·x³ + c·x⁵ (Jordan et al. 2024): the steepest slope at zero that keeps singular values near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Five iterations, in chains: see `_iterate`. A chain of all five would blow up bfloat16's rounding errors.
_CHAINS = (1, 1, 1, 1, 1)
_CHAINS_OF_LONG = (3, 2)
_EPS = 1e-7
_MAX_STACK = 1 << 26  # elements orthogonalised at once: bounds the memory beside the weights


def orthogonalize(stack: Tensor, scale: float = 1.0) -> Tensor:
    """Roughly `scale` times the nearest semi-orthogonal matrix of each matrix of stack [n, rows, cols], in its type.

    Five Newton-Schulz iterations bring all singular values that are not tiny beside their matrix's Frobenius norm
    to about 0.7 … 1.2, where the exact polar factor U·Vᵀ has 1. A matrix of zeros stays one.
    """
    tall = stack.shape[1] > stack.shape[2]
    x = (stack.mT if tall else stack).contiguous()  # wide: the products with the transpose are then the small ones
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=_EPS).to(x.dtype)
    chains = _CHAINS_OF_LONG if x.shape[2] >= 2 * x.shape[1] else _CHAINS
    for length in chains[:-1]:
        x = _iterate(x, length)
    x = _iterate(x, chains[-1], scale)
    return x.mT if tall else x


def _iterate(x: Tensor, length: int, scale: float = 1.0) -> Tensor:
    """`length` iterations X ← P·X with P = aI + bG + cG², G = X·Xᵀ, of x [n, r, c]; the last one times `scale`.

    As P and G commute, the next iteration's G is P·P·G. So a chain needs the long side c only for its first G and
    its last product: of matrices with c = 4r two chains take two thirds of the time of five.
    """
    gram = x @ x.mT
    product = polynomial = _polynomial(gram)
    for _ in range(length - 1):
        gram = polynomial @ (polynomial @ gram)
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return torch.baddbmm(x, product, x, beta=0.0, alpha=scale)


def _polynomial(gram: Tensor) -> Tensor:
    a, b, c = _QUINTIC
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=1, dim2=2).add_(a)
    return polynomial


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. Parameters are matrices [rows, cols].

        buffer ← μ·buffer + (1 - μ)·gradient        update = (1 - μ)·gradient + μ·buffer
        weight ← weight·(1 - lr·weight_decay) - lr·√max(1, rows/cols)·orthogonal(update)

    The scale is Jordan's: a step then changes a layer's output by the same size at any width (the spectral condition
    of Yang, Simon and Bernstein 2023), so one lr, about 0.02, serves small and large models. (Liu et al. 2025 scale by
    0.2·√max(rows, cols) in order to reuse AdamW's lr; here Muon's rate has a key of its own.)

    A group's `split` holds the row counts of the matrices that its parameters fuse; empty means one matrix. `dtype`
    is the type of the Newton-Schulz products. Parameters may be DTensors (FSDP). With a `process_group`, whose ranks
    must hold equal gradients or shares of the same ones, the ranks divide the matrices among themselves and gather the
    results, so that all weights stay equal; without one each works for itself.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._dtype = dtype
        self._process_group = process_group
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": ()}
        super().__init__(cast(Any, params), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _batches(p for p in group["params"] if p.grad is not None):
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of parameters that all have one shape."""
        stack = torch.stack([full_tensor(self._momentum(p, group["momentum"]).to(self._dtype)) for p in parameters])
        orthogonal = self._orthogonalize_parts(stack, group["split"] or (stack.shape[1],))
        for parameter, update in zip(parameters, orthogonal, strict=True):
            local = _local(parameter)
            local.mul_(1.0 - group["lr"] * group["weight_decay"])
            local.add_(_local(shard_like(update, parameter)), alpha=-group["lr"])

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Moves the parameter's buffer on, and returns Nesterov's look ahead of it."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)

    def _orthogonalize_parts(self, stack: Tensor, split: tuple[int, ...]) -> Tensor:
        """`orthogonalize`, scaled, of each of the matrices that lie above one another in stack [n, rows, cols]."""
        parts = stack.split_with_sizes(split, dim=1)
        done: dict[int, Iterator[Tensor]] = {}
        for rows in dict.fromkeys(split):
            same = torch.cat([part for part in parts if part.shape[1] == rows])
            result = self._orthogonalize_shared(same, math.sqrt(max(1.0, rows / stack.shape[2])))
            done[rows] = iter(result.chunk(len(result) // len(stack)))
        return torch.cat([next(done[rows]) for rows in split], dim=1)

    def _orthogonalize_shared(self, stack: Tensor, scale: float) -> Tensor:
        """`orthogonalize` of stack [n, rows, cols], of which each rank does its share."""
        ranks = 1 if self._process_group is None else dist.get_world_size(self._process_group)
        if ranks == 1:
            return orthogonalize(stack, scale)
        each = -(-len(stack) // ranks)
        first = each * dist.get_rank(self._process_group)
        mine = stack.new_zeros(each, *stack.shape[1:])
        share = stack[first : first + each]
        mine[: len(share)] = orthogonalize(share, scale)
        gathered = stack.new_empty(each * ranks, *stack.shape[1:])
        # As bytes, because not every backend knows bfloat16.
        dist.all_gather_into_tensor(gathered.view(torch.uint8), mine.view(torch.uint8), group=self._process_group)
        return gathered[: len(stack)]


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape together, but no more of them than fit into a stack."""
    by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        by_shape[parameter.shape].append(parameter)
    for shape, members in by_shape.items():
        most = max(1, _MAX_STACK // shape.numel())
        for first in range(0, len(members), most):
            yield members[first : first + most]


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that FSDP has split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
