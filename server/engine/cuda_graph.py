"""CUDA graphs for decode steps: one captured forward per batch size, replayed with no launch overhead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from server.engine.scheduler import ScheduledBatch
from server.engine.step_inputs import StepInputs

if TYPE_CHECKING:
    from server.engine.model_runner import ModelRunner


class CUDAGraphRunner:
    """Captured decode forwards."""

    @classmethod
    def create(cls, runner: ModelRunner) -> CUDAGraphRunner | None:
        """Capture for the runner's device, or None where graphs do not apply."""
        return None

    def can_replay(self, batch: ScheduledBatch) -> bool:
        return False

    def replay(self, inputs: StepInputs) -> torch.Tensor:
        raise NotImplementedError
