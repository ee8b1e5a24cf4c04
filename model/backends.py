"""Which attention backend runs on which device."""

from __future__ import annotations

import torch

from model.attention_cpu import NativeBackend
from model.attention_cuda import select_cuda_backend
from model.config import ModelConfig
from model.errors import ConfigError
from model.paged_attention import AttentionBackend, TorchBackend


def select_backend(
    name: str,
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    block_size: int = 16,
    *,
    deterministic: bool = False,
) -> AttentionBackend:
    """The backend called `name`, or the fastest that can run `config` there for "auto".

    `block_size` is the cache's: not every backend reads blocks of every size. `deterministic` asks, on CUDA, for one
    whose results depend on a token's own context alone; on the CPU the native one always is of that kind.
    Raises ConfigError if the named backend cannot run here.
    """
    device = torch.device(device)
    if device.type == "cuda" and deterministic:
        return select_cuda_backend(name, config, device, dtype, block_size, deterministic=True)
    if name == "torch":
        return TorchBackend()
    if device.type == "cuda" and name in ("auto", "varlen", "triton"):
        return select_cuda_backend(name, config, device, dtype, block_size)
    if name in ("auto", "native") and device.type == "cpu" and NativeBackend.supports(config, dtype):
        return NativeBackend()
    if name == "auto":
        return TorchBackend()
    raise ConfigError(f"attention backend {name!r} cannot run here; use auto or torch")
