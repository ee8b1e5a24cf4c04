"""The optimisers on two ranks against one process: whole weights, and the shares of FSDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from model.config import llama_config
from model.transformer import Transformer
from training.config import TrainSection
from training.distributed import full_tensor
from training.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors

# Three layers, and widths that two ranks cannot share evenly: rank 1 has fewer matrices and fewer rows.
MODEL = llama_config(3, 3, 1, 18, 25, max_seq_len=8, vocab_size=19)
RANKS = 2

Tensors = dict[str, Tensor]


class LossOf(nn.Module):
    """The root that FSDP wraps, so that the embedding is whole where the head needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer(MODEL)
        self.transformer.init_weights(seed=5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.transformer.compute_logits(self.transformer(tokens[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Run:
    """A model and its optimisers, on one process or on all ranks."""

    def __init__(self, optimizer: Any, sharded: bool) -> None:
        self.root = LossOf()
        if sharded:
            mesh = init_device_mesh("cpu", (RANKS,))
            for layer in self.root.transformer.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.root, mesh=mesh)
        self.model = self.root.transformer
        self.optimizers = build_optimizers(self.model, TrainSection(optimizer=optimizer, dtype="float32", lr=1e-2))

    def train(self, steps: range) -> None:
        """Every rank has the same batch, so that the average over ranks is the gradient of one."""
        for step in steps:
            tokens = torch.randint(MODEL.vocab_size, (4, 9), generator=torch.Generator().manual_seed(step))
            torch.autograd.backward(self.root(tokens))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Tensors:
        return whole(dict(self.model.named_parameters()))

    def state(self) -> Tensors:
        return whole(optimizer_tensors(self.optimizers, self.model))

    def take_over(self, weights: Tensors, state: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                held.copy_(share_of(weights[name], parameter))
        load_optimizer_tensors(self.optimizers, self.model, state)


def held_bytes(run: Run) -> int:
    """Memory behind this rank's optimiser state."""
    tensors = optimizer_tensors(run.optimizers, run.model).values()
    return sum((t.to_local() if isinstance(t, DTensor) else t).untyped_storage().nbytes() for t in tensors)


def whole(tensors: Tensors) -> Tensors:
    return {name: full_tensor(tensor.detach()).clone() for name, tensor in tensors.items()}


def share_of(full: Tensor, like: Tensor) -> Tensor:
    """The rows that torch.chunk gives this rank, as FSDP does."""
    if not isinstance(like, DTensor):
        return full
    shares = full.chunk(RANKS)
    return shares[dist.get_rank()] if dist.get_rank() < len(shares) else full[:0]


def assert_close(actual: Tensors, expected: Tensors) -> None:
    """Sums over ranks and batches of other sizes round otherwise; AdamW's first steps magnify that."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=1e-3, atol=2e-5), name


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def assert_equal_on_all_ranks(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        copies = [torch.empty_like(tensor) for _ in range(RANKS)]
        dist.all_gather(copies, tensor)
        assert all(torch.equal(copy, tensor) for copy in copies), name


def check_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    alone = {name: [Run(name, sharded=False) for _ in range(2)] for name in ("adamw", "muon")}
    for before, after in alone.values():
        before.train(range(3))
        after.train(range(6))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for name, (before, after) in alone.items():
            check_whole_weights(name, before)
            check_shares(name, before, after)
    finally:
        dist.destroy_process_group()


def check_whole_weights(name: str, before: Run) -> None:
    """DDP's situation: gradients are equal on all ranks when the optimisers step."""
    shared = Run(name, sharded=False)
    shared.train(range(3))
    assert_close(shared.weights(), before.weights())
    assert_equal_on_all_ranks(shared.weights())


def check_shares(name: str, before: Run, after: Run) -> None:
    """FSDP's: steps as of one process, state gathered and given out again, also to another number of ranks."""
    run = Run(name, sharded=True)
    assert all(isinstance(p, DTensor) for p in run.model.parameters())
    run.train(range(3))
    weights, state = run.weights(), run.state()
    assert_close(weights, before.weights())
    assert_close(state, before.state())
    resumed, from_one = Run(name, sharded=True), Run(name, sharded=True)
    resumed.take_over(weights, state)
    from_one.take_over(before.weights(), before.state())
    assert held_bytes(resumed) == held_bytes(run)
    for each in (run, resumed, from_one):
        each.train(range(3, 6))
    assert_same(resumed.weights(), run.weights())
    assert_same(resumed.state(), run.state())
    assert_close(from_one.weights(), after.weights())
    assert_close(run.weights(), after.weights())


@pytest.mark.slow
def test_two_ranks_step_as_one(tmp_path: Path) -> None:
    mp.spawn(check_rank, args=(str(tmp_path / "store"),), nprocs=RANKS)  # type: ignore[attr-defined, no-untyped-call]
