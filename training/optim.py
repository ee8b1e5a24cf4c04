"""AdamW with decay groups, and its state as named tensors so that it can be kept in safetensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.config import TrainSection
from training.errors import ResumeError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices (embeddings included) decay; norms and biases, which are vectors, do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), one fused kernel a step where the device has it."""
    device = next(model.parameters()).device.type
    groups = [group for group in decay_groups(model, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device in ("cpu", "cuda"),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `{parameter name}.{moment}`; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{moment}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises ResumeError when a moment is missing or misshapen."""
    if not tensors:
        return  # saved before the first step
    for name, parameter in model.named_parameters():
        state = {moment: tensors.get(f"{name}.{moment}") for moment in _MOMENTS}
        for moment, value in state.items():
            expected = torch.Size(()) if moment == "step" else parameter.shape
            if value is None or value.shape != expected:
                raise ResumeError(f"the saved state lacks {name}.{moment} in this model's shape; start a new run.dir")
        optimizer.state[parameter] = {
            moment: value.to(device=_home(moment, parameter), dtype=torch.float32, copy=True)
            for moment, value in state.items()
            if value is not None
        }


def _home(moment: str, parameter: Tensor) -> torch.device:
    # The fused kernel reads the step count where the parameter lives; the others keep it on the CPU.
    return parameter.device if moment != "step" or parameter.is_cuda else torch.device("cpu")
