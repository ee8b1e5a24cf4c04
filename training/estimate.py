"""What a recipe will need, without taking any of it: parameters, FLOPs, memory, passes over the data.

The model is built on torch's meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model.config import ModelConfig
from model.transformer import Transformer
from training.build import make_model_config
from training.config import TrainConfig
from training.data.dataset import open_folder
from training.metrics import flops_per_token
from training.muon import Muon
from training.optim import build_optimizers

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """For one rank that holds the whole model. Bytes are of what lives through a step; activations come on top.

    `parameters` are counts by part. `tokens_per_step` is one rank's. `train_flops` is for the whole run.
    """

    model: ModelConfig
    parameters: Mapping[str, int]
    flops_per_token: float
    tokens_per_step: int
    train_tokens: int
    train_flops: float
    data_tokens: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def epochs(self) -> float:
        """Passes over the training split."""
        return self.train_tokens / self.data_tokens

    @property
    def state_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def estimate(config: TrainConfig) -> Estimate:
    """Raises RecipeError, DataError or TokenizerError for a recipe that could not be trained.

    The data's content is not read: that is verified when training starts.
    """
    folder = open_folder(Path(config.data.dir), config.data.tokenizer)
    data_tokens = folder.open_split("train", verify=False).num_tokens
    model_config = make_model_config(config, folder.tokenizer)
    with torch.device("meta"):
        model = Transformer(model_config)
    flops = flops_per_token(model, model_config, config.train.seq_len)
    tokens = config.tokens_per_step * config.train.max_steps
    weights = sum(parameter.numel() for parameter in model.parameters()) * _FLOAT32_BYTES
    return Estimate(
        model=model_config, parameters=_parts(model), flops_per_token=flops, tokens_per_step=config.tokens_per_step,
        train_tokens=tokens, train_flops=flops * tokens, data_tokens=data_tokens, weights_bytes=weights,
        gradients_bytes=weights, optimizer_bytes=_optimizer_bytes(model, config),
    )  # fmt: skip


def _parts(model: nn.Module) -> dict[str, int]:
    counts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        counts[_part_of(name)] += parameter.numel()
    return counts


def _part_of(name: str) -> str:
    if name.startswith("embed"):
        return "embeddings"
    if name.startswith("lm_head"):
        return "head"
    if "norm" in name:
        return "norms"
    return "attention" if ".attn." in name else "mlp"


def _optimizer_bytes(model: nn.Module, config: TrainConfig) -> int:
    """float32 moments: two a weight for AdamW, one for Muon."""
    total = 0
    for optimizer in build_optimizers(model, config.train):
        moments = 1 if isinstance(optimizer, Muon) else 2
        weights = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        total += moments * weights * _FLOAT32_BYTES
    return total
