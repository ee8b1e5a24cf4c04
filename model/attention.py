"""Attention: the one place where dense (training) and paged (serving) execution part."""

from __future__ import annotations

from torch import Tensor, nn

from model.config import ModelConfig
from model.dense_attention import causal_attention
from model.layers import RMSNorm, apply_rotary
from model.linear import Linear
from model.paged_attention import PagedBatch


class Attention(nn.Module):
    """Causal self-attention with grouped queries; q, k and v come from one product.

    `forward(x, rotary, paged)`: x is [B, T, D] without `paged` and [N, D] with it. Dense execution sees the T
    tokens of x alone; paged execution appends them to the cache and reads each sequence's past from it.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.dropout = config.dropout
        self.sizes = [config.q_size, config.kv_size, config.kv_size]
        self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), config.qkv_bias)
        self.o_proj = Linear(config.q_size, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, paged: PagedBatch | None = None) -> Tensor:
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        k = k.unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if paged is None:
            out = causal_attention(q, k, v, window=self.window, dropout=self.dropout if self.training else 0.0)
        else:
            out = paged.attend(self.layer_index, q, k, v)
        return self.o_proj(out.flatten(-2))
