"""From a recipe to the objects of a run: device, model configuration, model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from model.config import ModelConfig, gpt2_config, llama_config
from model.errors import ConfigError
from model.hf import export_config
from model.hf_config import config_from_hf, config_to_hf
from model.presets import create_config
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.config import ModelSection, TrainConfig
from training.errors import RecipeError
from training.init_from import (
    bias_switches,
    config_from_folder,
    round_up,
    section_values,
    start_folder,
    weights_from_folder,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_REQUIRED = ("num_layers", "num_heads", "hidden_size", "max_seq_len")
# What differs from Llama's form; see the classes of these names in transformers.
_LLAMA_KIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6},
}


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
    """The model section with the tokenizer's vocabulary and special tokens.

    Raises RecipeError, naming the key, for a model that cannot be built, that cannot be saved for transformers, or
    that the tokenizer's ids or `train.seq_len` do not fit.
    """
    section = config.model
    if section.init_from is not None:
        model_config = config_from_folder(start_folder(section.init_from), config, tokenizer)
    else:
        try:
            model_config = _from_section(section, tokenizer)
        except ConfigError as error:
            raise RecipeError(f"[model] {error}") from None
    _check_savable(model_config, tokenizer)
    if config.train.seq_len > model_config.max_seq_len:
        raise RecipeError(
            f"train.seq_len is {config.train.seq_len} but the model's max_seq_len is only {model_config.max_seq_len}"
        )
    return model_config


def make_model(config: TrainConfig, model_config: ModelConfig) -> Transformer:
    """A float32 model on the CPU, so that every device starts from the same weights, which train.seed decides.

    With model.init_from they are the folder's, and train.seed decides the noise in rows that the vocabulary gains.
    Raises ConfigError or CheckpointError for a folder that cannot be loaded.
    """
    model = Transformer(model_config)
    if config.model.init_from is None:
        model.init_weights(config.train.seed)
        return model
    model.load_state_dict(weights_from_folder(start_folder(config.model.init_from), model_config, config.train.seed))
    return model


def _from_section(section: ModelSection, tokenizer: Tokenizer) -> ModelConfig:
    values = section_values(section)
    values |= {"vocab_size": round_up(tokenizer.vocab_size, section.vocab_multiple)}
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if section.preset is None:
        return replace(_from_sizes(section), **_with_bias(values, section.architecture))
    family = create_config(section.preset).architecture
    if section.architecture not in (None, family):
        raise RecipeError(
            f"model.architecture is {section.architecture} but model.preset {section.preset} is a {family}; "
            "leave one of them out"
        )
    return create_config(section.preset, **_with_bias(values, family))


def _with_bias(values: dict[str, Any], architecture: str | None) -> dict[str, Any]:
    """`bias` spelt out as the switches that the family has."""
    bias = values.pop("bias", None)
    return values if bias is None else values | dict.fromkeys(bias_switches(architecture), bias)


def _from_sizes(section: ModelSection) -> ModelConfig:
    if section.architecture is None:
        raise RecipeError(
            "model.preset is not set: name one, or set model.init_from, or model.architecture and every size"
        )
    layers, heads, hidden, context = (_size(section, name) for name in _REQUIRED)
    if hidden % heads:
        raise RecipeError(f"model.hidden_size ({hidden}) must be a multiple of model.num_heads ({heads})")
    if section.architecture in ("gpt2", "openai-gpt"):
        base = gpt2_config(layers, heads, hidden, max_seq_len=context)
        return replace(base, architecture=section.architecture, norm_first=section.architecture == "gpt2")
    # SwiGLU has three matrices where an MLP has two: 8/3 of the width keeps the size of the usual 4.
    inner = section.intermediate_size or round_up(-(-8 * hidden // 3), 16)
    base = llama_config(layers, heads, section.num_kv_heads or heads, hidden, inner, max_seq_len=context)
    return replace(base, architecture=section.architecture, **_LLAMA_KIN[section.architecture])


def _size(section: ModelSection, name: str) -> int:
    value = getattr(section, name)
    if value is None:
        raise RecipeError(f"model.{name} is not set; without model.preset every size must be given")
    if value < 1:
        raise RecipeError(f"model.{name} is {value} but must be at least 1")
    return int(value)


def _check_savable(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """What saving will ask, asked before hours of training."""
    try:
        config_from_hf(config_to_hf(export_config(config, tokenizer.vocab_size)))
    except ConfigError as error:
        raise RecipeError(f"[model] {error}") from None
