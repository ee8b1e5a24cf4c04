"""One optimiser step: micro-batches, gradients over the ranks, the guard against values that are no numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.batches import MicroBatches, seed_dropout
from training.config import TrainSection
from training.distributed import Distributed, full_tensor
from training.optim import set_learning_rates
from training.parallel import ParallelModel
from training.schedule import lr_factor


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss` is the objective's mean over the step's counted targets (nats), `grad_norm` the norm before clipping.

    `skipped`: one of the two was no number, so nothing was learnt. `stop`: a rank has been asked to stop.
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool


@dataclass(slots=True)
class Stepper:
    """Takes steps. `batches` gives this rank's micro-batches."""

    model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    batches: MicroBatches
    settings: TrainSection
    distributed: Distributed
    _parameters: list[torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.model.transformer.parameters() if p.requires_grad]

    @property
    def sequences_per_step(self) -> int:
        """Of all ranks."""
        return self.settings.batch_size * self.settings.grad_accum_steps * self.distributed.world_size

    def step(self, step: int, sequences: int, *, stop: bool = False) -> StepResult:
        """Step number `step` (0-based) from the run's sequence number `sequences` on.

        `stop` is this rank's wish, which one collective shares together with the loss. The host waits for the
        device once, between the gradients and the update.
        """
        if not self.model.root.training:
            self.model.root.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = self._accumulate(sequences)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        shared = self.distributed.sum(torch.stack((total, torch.full_like(total, float(stop)))))
        loss, wishes, grad_norm = torch.cat((shared, norm.float().reshape(1))).tolist()
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            self._update(step, norm, grad_norm)
        skipped = not is_finite and not (math.isfinite(loss) and self._can_scale_down())
        if self.scaler.is_enabled():
            self.scaler.update()
        return StepResult(loss, grad_norm, skipped, wishes > 0)

    def _can_scale_down(self) -> bool:
        """Loss scaling grows until gradients overflow, so a step lost to that is part of it; below 1 it is not."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0

    def _accumulate(self, sequences: int) -> Tensor:
        """Gradients of this rank's micro-batches. Returns their share of the step's mean loss, still on the device."""
        settings, ranks = self.settings, self.distributed.world_size
        # Data-parallel wrappers average over the ranks, so each divides by the mean number of targets of a rank. All
        # ranks can tell how many that are, for the data are a function of their numbers.
        targets_per_rank = self.batches.size(sequences, self.sequences_per_step).targets / ranks
        total = torch.zeros((), device=self.distributed.device)
        for micro in range(settings.grad_accum_steps):
            first = sequences + (micro * ranks + self.distributed.rank) * settings.batch_size
            inputs, targets = self.batches.get(first)
            seed_dropout(settings.seed, first, self.distributed.device)
            with self.model.micro_step(micro == settings.grad_accum_steps - 1):
                loss = self.model.training_loss(inputs, targets) / targets_per_rank
                torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        return total / ranks

    def _update(self, step: int, norm: Tensor, grad_norm: float) -> None:
        limit = self.settings.grad_clip
        if limit and grad_norm > limit:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        set_learning_rates(self.optimizers, lr_factor(step, self.settings))
        # Not through the scaler: it would let one optimiser step where another must not.
        for optimizer in self.optimizers:
            optimizer.step()
