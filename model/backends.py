"""Which attention backend runs on which device."""

from __future__ import annotations

import torch

from model.attention_cpu import NativeBackend
from model.config import ModelConfig
from model.errors import ConfigError
from model.paged_attention import AttentionBackend, TorchBackend


def select_backend(name: str, config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name`, or the fastest that can run `config` there for "auto".

    Raises ConfigError if the named one cannot run here.
    """
    on_cpu = torch.device(device).type == "cpu"
    if name == "torch":
        return TorchBackend()
    if name in ("auto", "native") and on_cpu and NativeBackend.supports(config, dtype):
        return NativeBackend()
    if name == "auto":
        return TorchBackend()
    raise ConfigError(f"attention backend {name!r} cannot run here; use auto or torch")
