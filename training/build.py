"""From a recipe to the objects of a run: device, model configuration, model."""

from __future__ import annotations

import dataclasses

import torch

from model.config import ModelConfig, gpt2_config, llama_config
from model.presets import create_config
from model.tokenizer import Tokenizer
from training.config import ModelSection, TrainConfig
from training.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_REQUIRED = ("num_layers", "num_heads", "hidden_size", "max_seq_len")


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or else the CPU. Raises RecipeError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise RecipeError(f"device {name!r} is not available on this machine; use device cpu or auto")
    return device


def make_model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model section with the tokenizer's vocabulary and special tokens. Raises RecipeError or ConfigError."""
    values = {key: value for key, value in dataclasses.asdict(config.model).items() if value is not None}
    multiple = values.pop("vocab_multiple")
    values |= {"vocab_size": -(-tokenizer.vocab_size // multiple) * multiple}
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values.pop("init_from", None)
    preset, architecture = values.pop("preset", None), values.pop("architecture", None)
    if preset is not None:
        model_config = create_config(preset, **values)
        if architecture not in (None, model_config.architecture):
            raise RecipeError(
                f"model.architecture is {architecture} but model.preset {preset} is a {model_config.architecture}; "
                "leave one of them out"
            )
    else:
        model_config = dataclasses.replace(_from_sizes(architecture, config.model), **values)
    if config.train.seq_len > model_config.max_seq_len:
        raise RecipeError(
            f"train.seq_len is {config.train.seq_len} but the model's max_seq_len is only {model_config.max_seq_len}"
        )
    return model_config


def _from_sizes(architecture: str | None, section: ModelSection) -> ModelConfig:
    if architecture is None:
        raise RecipeError("model.preset is not set: name one, or set model.architecture and every size")
    layers, heads, hidden, context = (_size(section, name) for name in _REQUIRED)
    if hidden % heads:
        raise RecipeError(f"model.hidden_size ({hidden}) must be a multiple of model.num_heads ({heads})")
    if architecture == "gpt2":
        return gpt2_config(layers, heads, hidden, max_seq_len=context)
    # SwiGLU has three matrices where an MLP has two: 8/3 of the width keeps the size of the usual 4.
    inner = section.intermediate_size or -(-8 * hidden // 48) * 16
    kv_heads = section.num_kv_heads or heads
    return llama_config(layers, heads, kv_heads, hidden, inner, max_seq_len=context)


def _size(section: ModelSection, name: str) -> int:
    value = getattr(section, name)
    if value is None:
        raise RecipeError(f"model.{name} is not set; without model.preset every size must be given")
    if value < 1:
        raise RecipeError(f"model.{name} is {value} but must be at least 1")
    return int(value)
