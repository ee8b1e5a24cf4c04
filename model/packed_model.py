"""PackedModel: a CPUDecoder where a model is wanted that generates by itself, without an engine."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cpu_decoder import CPUDecoder
from model.dense_cache import DenseKVCache
from model.errors import ConfigError
from model.generate import CausalModel
from model.paged_attention import PagedBatch
from model.transformer import Transformer

_MAX_ROWS = 512


def pack_model(model: Transformer) -> CausalModel:
    """The model as the engine would run it: on a CPU, its weights are taken over and `model` is of no further use."""
    if model.device.type != "cpu":
        return model
    if CPUDecoder.supports(model.config, model.dtype) and CPUDecoder.is_fastest():
        return PackedModel(model)
    model.pack_for_cpu()
    return model


class PackedModel:
    """A model for `generate` and its relatives whose weights were taken over from `model`, which is empty afterwards.

    Computes, to the bit, what the engine computes with the same weights on this machine.
    """

    def __init__(self, model: Transformer, quantization: str = "none") -> None:
        """Raises ConfigError where the compiled kernels cannot run the model."""
        self.config = model.config
        self._decoder = CPUDecoder(model, _MAX_ROWS, quantization)

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, input_ids: Tensor, cache: DenseKVCache | None = None) -> Tensor:
        """Hidden states [B, T, D] of input_ids [B, T], which follow what `cache` holds.

        Raises ConfigError for more than 512 sequences.
        """
        batch_size, length = input_ids.shape
        if batch_size > _MAX_ROWS:
            raise ConfigError(f"{batch_size} sequences at once are too many; give at most {_MAX_ROWS}")
        cache = cache or self.new_dense_cache(batch_size, length)
        parts = [self._forward(part, cache) for part in input_ids.split(_MAX_ROWS // batch_size, dim=1)]
        return torch.cat(parts, dim=1)

    def forward_paged(self, input_ids: Tensor, positions: Tensor, paged: PagedBatch) -> Tensor:
        """Hidden states [N, D] of a flattened batch: input_ids and positions are [N]."""
        self._decoder.reserve(input_ids.numel())
        self._decoder.bind(paged.cache)
        rows = torch.arange(paged.metadata.num_tokens)
        return self._decoder.forward(input_ids, positions, paged.metadata, rows)

    def _forward(self, input_ids: Tensor, cache: DenseKVCache) -> Tensor:
        positions, batch = cache.extend(input_ids.shape[1])
        return self.forward_paged(input_ids.flatten(), positions, batch).unflatten(0, input_ids.shape)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in float32 of hidden states [..., D]."""
        rows = hidden.flatten(0, -2)
        logits = [self._decoder.logits(part) for part in rows.split(_MAX_ROWS)]
        return torch.cat(logits).unflatten(0, hidden.shape[:-1])

    def new_dense_cache(self, batch_size: int = 1, max_len: int | None = None) -> DenseKVCache:
        """A cache for up to `max_len` tokens a row (default: the context)."""
        return DenseKVCache(
            self.config,
            batch_size=batch_size,
            max_len=max_len or self.config.max_seq_len,
            dtype=self.dtype,
            device=self.device,
            backend="native",
        )
