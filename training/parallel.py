"""The training objective as one module, and how several ranks share it: DDP (whole weights) or FSDP2 (a share)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from training.build import DTYPES
from training.config import TrainSection
from training.distributed import Distributed
from training.loss import max_logits, summed_cross_entropy


class LossModel(nn.Module):
    """Token ids to the summed loss: the root that torch.compile, DDP and FSDP wrap.

    In training mode the loss has the recipe's label smoothing and z-loss; in eval mode it is plain cross-entropy over
    the first `vocab_size` tokens, as the saved checkpoint computes it, which has no padding of the vocabulary.
    """

    def __init__(self, transformer: Transformer, settings: TrainSection, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.max_logits = max_logits(device)
        self.transformer = transformer
        self.dtype = DTYPES[settings.dtype]
        extra = {"label_smoothing": settings.label_smoothing, "z_loss": settings.z_loss}
        self.extra = {name: value for name, value in extra.items() if value}

    def forward(self, inputs: Tensor, targets: Tensor, skip: int = 0) -> Tensor:
        """Sum of the losses (nats, float32) of targets [B, T] from position `skip` on, given inputs [B, T]."""
        extra = self.extra if self.training else {}
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.transformer(inputs)
            return summed_cross_entropy(
                self.transformer.compute_logits if self.training else self._unpadded_logits, hidden[:, skip:],
                targets[:, skip:], vocab_size=self.transformer.config.vocab_size, limit=self.max_logits, **extra,
            )  # fmt: skip

    def _unpadded_logits(self, hidden: Tensor) -> Tensor:
        return self.transformer.compute_logits(hidden)[..., : self.vocab_size]


class ParallelModel:
    """A LossModel on this run's ranks. Weights are float32; autocast chooses the type of products.

    `vocab_size` is the tokenizer's, of which the model's may be a padded form.
    """

    def __init__(
        self, transformer: Transformer, settings: TrainSection, distributed: Distributed, vocab_size: int
    ) -> None:
        device = distributed.device
        compiled = settings.compile if settings.compile is not None else device.type == "cuda"
        transformer.recompute_layers = settings.activation_checkpointing
        self.root = LossModel(transformer, settings, vocab_size, device)
        self.is_sharded = distributed.world_size > 1 and settings.parallel == "fsdp"
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        self._train: Callable[[Tensor, Tensor], Tensor] = self.root
        if self.is_sharded:
            _shard(self.root, distributed, compiled)
            return
        self.root.to(device)
        if compiled:
            self._train = torch.compile(self.root)
        if distributed.world_size > 1:
            # Compiled inside of DDP: the other way round, dynamo cannot split graphs that recompute activations.
            self._train = self._ddp = nn.parallel.DistributedDataParallel(
                cast(nn.Module, self._train), device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )  # fmt: skip

    @property
    def transformer(self) -> Transformer:
        return self.root.transformer

    def training_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The objective, summed over targets, with gradients."""
        return self._train(inputs, targets)

    def validation_loss(self, inputs: Tensor, targets: Tensor, skip: int = 0) -> Tensor:
        """Cross-entropy, summed over targets from `skip` on; in eval mode. Under FSDP every rank must call it."""
        return cast(Tensor, self.root(inputs, targets, skip))

    @contextlib.contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-step: gradients travel between ranks in the last one."""
        if self.is_sharded:
            root = cast(Any, self.root)
            root.set_requires_gradient_sync(is_last)
            root.set_is_last_backward(is_last)
        if self._ddp is None or is_last:
            yield
            return
        with self._ddp.no_sync():
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; afterwards the weights are split again."""
        was_training = self.root.training
        self.root.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.root.train(was_training)
            if self.is_sharded:
                cast(Any, self.root).reshard()


def _shard(root: LossModel, distributed: Distributed, compiled: bool) -> None:
    """FSDP2: each layer is gathered when it runs; the embedding, head and last norm belong to the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    for layer in root.transformer.layers:
        if compiled:  # only the computation: FSDP's hooks around it gather and split
            setattr(layer, "forward", torch.compile(layer.forward))  # noqa: B010
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
