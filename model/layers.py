"""The building blocks beside attention: norms, rotary positions, MLPs, each chosen once from the ModelConfig."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import fused
from model.config import ModelConfig, RopeScaling
from model.linear import Linear, activate


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, with an optional bias."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019): statistics in float32, scaled in the input's type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if fused.can_normalise(x):
            return fused.rms_norm(x, self.weight, self.eps)
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale).to(x.dtype) * self.weight


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, config.norm_eps)
    return LayerNorm(size, config.norm_eps, config.norm_bias)


class MLP(nn.Module):
    """down(act(up(x))), as in GPT-1 and GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = Linear(
            config.hidden_size, config.intermediate_size, config.mlp_bias, activation=config.activation
        )
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), the SwiGLU form (Shazeer 2020); gate and up are one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)
        if fused.can_activate(gate_up, self.activation):
            return self.down_proj(fused.gated_activation(gate_up, self.activation))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(activate(gate, self.activation) * up)


def make_mlp(config: ModelConfig) -> MLP | GatedMLP:
    return GatedMLP(config) if config.gated_mlp else MLP(config)


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al. 2021) in the half-split form: dimension i is paired with i + d/2.

    `forward(positions [...]) -> (cos, sin)`, each [..., 1, d] in float32, ready to broadcast over heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Built on first use: modules are constructed on the meta device when weights are loaded.
        self._table: Tensor | None = None

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._table is None or self._table.device != positions.device:
            self._table = self._build(positions.device)
        cos, sin = self._table[positions].unsqueeze(-2).chunk(2, dim=-1)
        return cos, sin

    def _build(self, device: torch.device) -> Tensor:
        config = self.config
        inv_freq = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Inverse frequencies [d/2], float32, after Llama 3's scaling where the checkpoint asks for it."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling is None:
        return inv_freq
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_seq_len / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return inv_freq * (blend + (1 - blend) / scaling.factor)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., heads, d] by the angles of its positions; computed in x's type."""
    if fused.can_rotate(x, cos):
        return fused.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
