"""The decoder-only transformer, assembled once for every family from its ModelConfig."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.config import ModelConfig
from model.dense_cache import DenseKVCache
from model.dropout import dropout
from model.layers import RotaryEmbedding, make_mlp, make_norm
from model.linear import Linear, Product
from model.packed_linear import pack_weight
from model.paged_attention import PagedBatch


class TransformerBlock(nn.Module):
    """Attention and MLP, each with a residual; norms come before them, or after the sums for GPT-1."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.hidden_size)
        self.attn = Attention(config, layer_index)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = make_mlp(config)
        self.norm_first = config.norm_first
        self.dropout = config.dropout

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, paged: PagedBatch | None) -> Tensor:
        if self.norm_first:
            x = x + dropout(self.attn(self.attn_norm(x), rotary, paged), self.dropout, self.training)
            return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)
        x = self.attn_norm(x + dropout(self.attn(x, rotary, paged), self.dropout, self.training))
        return self.mlp_norm(x + dropout(self.mlp(x), self.dropout, self.training))


class Transformer(nn.Module):
    """Token ids to hidden states; `compute_logits` turns hidden states into logits.

    Two ways in: `forward` for whole sequences of one length (training, or alone with a DenseKVCache) and
    `forward_paged` for the engine's flattened batches.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.embed_positions = nn.Embedding(config.max_seq_len, config.hidden_size) if learned else None
        self.rotary = None if learned else RotaryEmbedding(config)
        self.layers = nn.ModuleList(TransformerBlock(config, index) for index in range(config.num_layers))
        self.final_norm = make_norm(config, config.hidden_size) if config.norm_first else None
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, False)
        self._packed_head: Product | None = None
        self.recompute_layers = False
        """In training, keep only each layer's input and compute the rest again in the backward pass."""

    def forward(self, input_ids: Tensor, cache: DenseKVCache | None = None) -> Tensor:
        """Hidden states [B, T, D] of input_ids [B, T], which follow what `cache` holds."""
        if cache is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            return self._run(input_ids, positions, None)
        positions, paged = cache.extend(input_ids.shape[1])
        hidden = self._run(input_ids.flatten(), positions, paged)
        return hidden.unflatten(0, input_ids.shape)

    def forward_paged(self, input_ids: Tensor, positions: Tensor, paged: PagedBatch) -> Tensor:
        """Hidden states [N, D] of a flattened batch: input_ids and positions are [N]."""
        return self._run(input_ids, positions, paged)

    def _run(self, input_ids: Tensor, positions: Tensor, paged: PagedBatch | None) -> Tensor:
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        x = dropout(x, self.config.dropout, self.training)
        rotary = None
        if self.rotary is not None:
            cos, sin = self.rotary(positions)
            rotary = cos.to(x.dtype), sin.to(x.dtype)  # once, not in every layer
        for layer in self.layers:
            if self.recompute_layers and self.training:
                x = checkpoint(layer, x, rotary, paged, use_reentrant=False)
            else:
                x = layer(x, rotary, paged)
        return x if self.final_norm is None else self.final_norm(x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        if self._packed_head is not None:
            return self._packed_head(hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden, self.embed_tokens.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def new_dense_cache(self, batch_size: int = 1, max_len: int | None = None) -> DenseKVCache:
        """A cache for `forward`, for up to `max_len` tokens a row (default: the context)."""
        return DenseKVCache(
            self.config,
            batch_size=batch_size,
            max_len=max_len or self.config.max_seq_len,
            dtype=self.dtype,
            device=self.device,
        )

    def init_weights(self, seed: int = 0) -> None:
        """GPT-2's initialisation: normal, std 0.02; projections into the residual divided by sqrt(2 * layers)."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    parameter.normal_(0.0, residual_std if into_residual else 0.02, generator=generator)

    def use_head(self, product: Product) -> None:
        """Compute the logits of tied embeddings in another way: hidden states [..., D] to [..., V]."""
        self._packed_head = product

    def pack_for_cpu(self) -> None:
        """Lay all products out for this CPU. Afterwards the model only infers: see `Linear.pack`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self.lm_head is None:
            self._packed_head = pack_weight(self.embed_tokens.weight.detach(), None, None)
