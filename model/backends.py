"""Which attention backend runs on which device."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.errors import ConfigError
from model.paged_attention import AttentionBackend, TorchBackend


def select_backend(name: str, config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name`, or the fastest that can run `config` there for "auto".

    Raises ConfigError if the named one cannot run here.
    """
    del config, device, dtype
    if name in ("auto", "torch"):
        return TorchBackend()
    raise ConfigError(f"attention backend {name!r} is unknown; use auto or torch")
