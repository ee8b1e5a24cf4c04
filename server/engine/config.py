"""EngineConfig: everything the engine's process needs to start, as plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint folder and the name that requests use for it."""

    model_path: str
    model_name: str


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`model_path` is a checkpoint folder; `further_models` are served beside it. Sizes left at None are chosen for the
    model and device at hand.

    `kv_cache_memory` is in bytes; `num_threads` is torch's intra-op thread count;
    `deterministic` refuses to run where tokens would depend on what else runs; on CUDA it costs speed to make them not.
    `trace_requests` counts what each request meets (RequestTrace), for a server that keeps a history;
    `strict_self_check` refuses a model whose logits are not those stored with it.
    `speculation` lets sequences guess their next tokens from their own text, where that costs little;
    `cuda_graphs` lets decode steps on CUDA replay captured graphs, at the price of some memory and start-up time;
    `overlap` prepares each step while the one before it still runs (None: on CUDA, where the host is free to), and
    nothing is guessed then.
    """

    model_path: str
    model_name: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | None = None
    block_size: int = 16
    prefix_caching: bool = True
    attention_backend: str = "auto"
    num_threads: int | None = None
    cuda_graphs: bool = True
    overlap: bool | None = None
    speculation: bool = True
    deterministic: bool = False
    strict_self_check: bool = False
    trace_requests: bool = False
    further_models: tuple[ModelSource, ...] = ()

    def each(self) -> list[EngineConfig]:
        """One configuration for each of the models."""
        return [
            dataclasses.replace(self, model_path=path, model_name=name, further_models=())
            for path, name in [
                (self.model_path, self.model_name),
                *((model.model_path, model.model_name) for model in self.further_models),
            ]
        ]
