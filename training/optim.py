"""The optimisers of a recipe, and their state as named tensors so that it can be kept in safetensors.

AdamW for everything, or Muon for the matrices of the layers and AdamW for the rest. The trainer steps all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.attention import Attention
from model.layers import GatedMLP
from training.config import TrainSection
from training.distributed import shard_like
from training.errors import ResumeError
from training.muon import Muon

Group = dict[str, object]


def build_optimizers(model: nn.Module, config: TrainSection) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon and AdamW. Build them after FSDP has sharded the model, which replaces its parameters.

    Under torchrun the ranks share Muon's work; its products are float32 in a float32 run, otherwise bfloat16.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return [_build_adamw(parameters, config)]
    muon_groups = _muon_groups(model, config)
    hidden = {p for group in muon_groups for p in group["params"]}  # type: ignore[attr-defined]
    parallel = dist.is_initialized() and dist.get_world_size() > 1
    muon = Muon(
        muon_groups,
        lr=config.muon_lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
        process_group=dist.group.WORLD if parallel else None,
    )
    return [muon, _build_adamw([p for p in parameters if p not in hidden], config)]


def decay_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Matrices (embeddings included) decay; norms and biases, which are vectors, do not."""
    return _split_by_decay([p for p in model.parameters() if p.requires_grad], weight_decay)


def _split_by_decay(parameters: Sequence[Tensor], weight_decay: float) -> list[Group]:
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _build_adamw(parameters: Sequence[Tensor], config: TrainSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), one fused kernel a step where the device has it."""
    groups = [group for group in _split_by_decay(parameters, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(
        [group | {"peak_lr": config.lr} for group in groups],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def _muon_groups(model: nn.Module, config: TrainSection) -> list[Group]:
    """The layers' matrices, grouped by the row counts of the matrices they fuse."""
    splits = _fused_rows(model)
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and parameter.dim() == 2 and parameter.requires_grad:
            groups.setdefault(splits.get(parameter, ()), []).append(parameter)
    return [{"params": members, "split": split, "peak_lr": config.muon_lr} for split, members in groups.items()]


def _fused_rows(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Row counts of q, k, v and of gate, up: one product each, but matrices of their own to Muon."""
    rows: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            rows[module.qkv_proj.weight] = tuple(module.sizes)
        elif isinstance(module, GatedMLP):
            weight = module.gate_up_proj.weight
            rows[weight] = (weight.shape[0] // 2,) * 2
    return rows


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def optimizer_tensors(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """The optimisers' state as `{parameter name}.{moment}`; empty before the first step.

    AdamW's moments are exp_avg, exp_avg_sq and step, Muon's is momentum_buffer; under FSDP they are DTensors.
    """
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for name, parameter in _named_parameters(optimizer, model):
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{moment}"] = value
    return tensors


def load_optimizer_tensors(
    optimizers: Iterable[torch.optim.Optimizer], model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, from whole tensors on the CPU.

    Raises ResumeError when a moment is missing, misshapen or of no parameter; nothing is changed then.
    """
    if not tensors:
        return  # saved before the first step
    wanted = {
        (optimizer, parameter): {moment: f"{name}.{moment}" for moment in _moments(optimizer)}
        for optimizer in optimizers
        for name, parameter in _named_parameters(optimizer, model)
    }
    for (_, parameter), names in wanted.items():
        for moment, name in names.items():
            expected = torch.Size(()) if moment == "step" else parameter.shape
            if name not in tensors or tensors[name].shape != expected:
                raise ResumeError(f"the saved state lacks {name} in this model's shape; start a new run.dir")
    unknown = tensors.keys() - {name for names in wanted.values() for name in names.values()}
    if unknown:
        raise ResumeError(f"the saved state's {min(unknown)} belongs to another optimizer; start a new run.dir")
    for (optimizer, parameter), names in wanted.items():
        optimizer.state[parameter] = {
            moment: _place(tensors[name], moment, parameter) for moment, name in names.items()
        }


def _place(value: Tensor, moment: str, parameter: Tensor) -> Tensor:
    """A copy of a saved moment where the optimiser keeps it, under FSDP this rank's share."""
    if moment == "step":
        # The fused kernel reads the step count where the parameter lives; the others keep it on the CPU.
        return value.to(parameter.device if parameter.is_cuda else "cpu", torch.float32, copy=True)
    # A copy of the share alone: the optimiser writes into it, and a view would keep the whole moment in memory.
    return shard_like(value.to(parameter.device, torch.float32), parameter).clone()


def _moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return ("momentum_buffer",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq", "step")


def _named_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[str, Tensor]]:
    mine = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter in mine]


def build_optimizer(model: nn.Module, config: TrainSection) -> torch.optim.AdamW:
    """`build_optimizers` for AdamW alone."""
    return _build_adamw([p for p in model.parameters() if p.requires_grad], config)
