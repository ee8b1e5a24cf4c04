"""Training that goes on from other weights: `model.init_from` is a folder, or a model's name on the Hub.

The data's tokenizer must be the folder's, or be it with tokens added behind its vocabulary (`prepare --tokenizer FOLDER
--add-token …` or `--control …`): the embedding then gets rows for them. Steps, learning rate and optimiser start anew.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import load_config, load_model
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError, HubError
from model.hub import resolve_model
from model.manifest import weights_digest
from model.resize import resize_vocabulary
from model.tokenizer import Tokenizer
from model.tokenizer.extension import is_extension
from model.tokenizer.files import TOKENIZER_FILE
from training.config import ModelSection, TrainConfig
from training.errors import RecipeError

_PRODUCTS = ("qkv_bias", "o_bias", "mlp_bias")
# Models pad their vocabulary for speed; a larger difference is another tokenizer.
_MOST_PADDING = 1_024


@cache
def start_folder(init_from: str) -> Path:
    """The folder of `model.init_from`: one for the whole run, even if a branch on the Hub moves meanwhile.

    Raises RecipeError for what is neither a folder nor a name, or cannot be fetched.
    """
    try:
        return resolve_model(init_from)
    except (CheckpointError, HubError) as error:
        raise RecipeError(f"model.init_from: {error}") from None


def config_from_folder(folder: Path, config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The folder's configuration, with rows for the data's `tokenizer`; the recipe may repeat it and set the dropout.

    Raises RecipeError, naming the key, for what does not fit.
    """
    section = config.model
    try:
        base = load_config(folder)
    except ConfigError as error:
        raise RecipeError(f"model.init_from: {error}") from None
    _check_same_model(folder, base, section)
    _check_tokenizer(folder, base, tokenizer)
    if config.train.lora_rank and tokenizer.vocab_size > known_tokens(folder, base):
        raise RecipeError(
            "train.lora_rank leaves the embedding as it is, but data.dir has tokens that it has no rows for; "
            "train without it, or prepare the data without added tokens"
        )
    return replace(
        base,
        vocab_size=round_up(max(base.vocab_size, tokenizer.vocab_size), section.vocab_multiple),
        dropout=base.dropout if section.dropout is None else section.dropout,
        bos_token_id=tokenizer.bos_token_id if base.bos_token_id is None else base.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if base.eos_token_id is None else base.eos_token_id,
    )


def weights_from_folder(folder: Path, model_config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The folder's weights in float32; rows of the vocabulary that no token of the folder has start at the mean."""
    model = load_model(folder, dtype=torch.float32)
    return resize_vocabulary(model.state_dict(), known_tokens(folder, model.config), model_config.vocab_size, seed)


def describe_start(folder: Path, tokenizer: Tokenizer) -> str:
    """One line about the weights and the tokens that are new to them."""
    known = known_tokens(folder, load_config(folder))
    line, added = f"starting from {folder} ({weights_digest(folder)})", tokenizer.vocab_size - known
    if added <= 0:
        return line
    what = "1 token is new, its row" if added == 1 else f"{added:,} tokens are new, their rows"
    return f"{line}; {what} in the vocabulary set to the mean of the {known:,} known ones, with a little noise"


def known_tokens(folder: Path, base: ModelConfig) -> int:
    """The folder's tokens; rows of the vocabulary behind them are padding."""
    if not (folder / TOKENIZER_FILE).is_file():
        return base.vocab_size
    return min(base.vocab_size, Tokenizer.load(folder).vocab_size)


def section_values(section: ModelSection) -> dict[str, Any]:
    """The keys that are set, but those that are no fields of a ModelConfig."""
    values = {key: value for key, value in dataclasses.asdict(section).items() if value is not None}
    for key in ("init_from", "preset", "architecture", "vocab_multiple"):
        values.pop(key, None)
    return values


def bias_switches(architecture: str | None) -> tuple[str, ...]:
    """The fields of a ModelConfig that `model.bias` stands for."""
    if architecture in ("gpt2", "openai-gpt"):
        return (*_PRODUCTS, "norm_bias")
    return ("qkv_bias", "o_bias") if architecture == "qwen3" else _PRODUCTS


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _check_same_model(folder: Path, base: ModelConfig, section: ModelSection) -> None:
    if section.preset is not None:
        raise RecipeError(f"model.preset is {section.preset} but model.init_from gives every size; leave one out")
    values = section_values(section)
    values.pop("dropout", None)
    if section.architecture is not None:
        values["architecture"] = section.architecture
    bias = values.pop("bias", None)
    found = {key: getattr(base, key) for key in values}
    if bias is not None and any(getattr(base, name) != bias for name in bias_switches(base.architecture)):
        values, found = values | {"bias": bias}, found | {"bias": not bias}
    for key, value in values.items():
        if value != found[key]:
            raise RecipeError(f"model.{key} is {value} but {found[key]} in {folder}, model.init_from; leave it out")


def _check_tokenizer(folder: Path, base: ModelConfig, tokenizer: Tokenizer) -> None:
    if (folder / TOKENIZER_FILE).is_file():
        own = Tokenizer.load(folder)
        fits = own.vocab_size <= base.vocab_size and is_extension(tokenizer, own)
    else:
        padding = base.vocab_size - tokenizer.vocab_size
        fits = 0 <= padding < _MOST_PADDING and all(token < tokenizer.vocab_size for token in base.eos_token_ids)
    if fits:
        return
    if tokenizer.vocab_size > base.vocab_size:
        raise RecipeError(
            f"data.dir holds token ids beyond the vocabulary: its tokenizer has {tokenizer.vocab_size} tokens and does "
            f"not extend that of the model in {folder}, which has {base.vocab_size}; "
            f"prepare the data with --tokenizer {folder}"
        )
    raise RecipeError(
        f"data.dir was prepared with another tokenizer than that of {folder}, model.init_from; "
        f"prepare it with --tokenizer {folder}"
    )
