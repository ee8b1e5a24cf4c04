"""Presets: their published sizes, and how overrides carry over to the sizes that depend on them."""

from __future__ import annotations

import pytest
import torch

from model.config import count_parameters
from model.errors import ConfigError
from model.presets import PRESET_ALIASES, PRESETS, create_config
from model.transformer import Transformer

SIZES = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt2-untied": 163_037_184,
    "openai-gpt": 116_534_784,
    "llama-tiny": 6_031_616,
    "llama-small": 16_421_760,
    "llama-medium": 116_411_136,
    "llama-large": 398_509_056,
    "shakespeare-char": 10_646_784 + 256 * 384,  # 10.65M besides the positions
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name: str) -> None:
    assert count_parameters(PRESETS[name]) == SIZES[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(PRESETS[name]).parameters()) == SIZES[name]


def test_every_preset_is_listed_here() -> None:
    assert set(PRESETS) == set(SIZES)


@pytest.mark.parametrize("alias", ["tiny", "small", "medium", "large"])
def test_short_names(alias: str) -> None:
    assert create_config(alias) == PRESETS[PRESET_ALIASES[alias]] == PRESETS[f"llama-{alias}"]


def test_dependent_sizes_follow() -> None:
    config = create_config("gpt2", hidden_size=384, num_heads=6, num_layers=3, max_seq_len=32)
    assert (config.head_dim, config.num_kv_heads, config.intermediate_size) == (64, 6, 1_536)
    grouped = create_config("llama-tiny", num_heads=8)
    assert (grouped.num_kv_heads, grouped.head_dim) == (4, 32)


def test_what_is_given_is_kept() -> None:
    config = create_config("llama-tiny", hidden_size=128, head_dim=64, intermediate_size=200, num_kv_heads=1)
    assert (config.head_dim, config.intermediate_size, config.num_kv_heads) == (64, 200, 1)


def test_special_tokens_stay_inside_the_vocabulary() -> None:
    assert create_config("gpt2", vocab_size=50_304).eos_token_id == 50_256
    small = create_config("gpt2", vocab_size=65)
    assert small.eos_token_id is None
    assert small.bos_token_id is None
    assert create_config("gpt2", vocab_size=65, eos_token_id=1).eos_token_id == 1


def test_bias_sets_the_four_switches_at_once() -> None:
    config = create_config("gpt2", bias=False, norm_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.norm_bias) == (False, False, False, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_layer": 3}, "n_layer is not a field"),
        ({"hidden_size": 100}, "hidden_size must be a multiple of num_heads"),
        ({"hidden_size": "100"}, "hidden_size must be a positive integer"),
        ({"num_heads": 0}, "num_heads must be a positive integer"),
        ({"dropout": 2}, "dropout"),
        ({"bias": "no"}, "qkv_bias must be true or false"),
        ({"num_heads": 3}, "num_kv_heads must be given"),
    ],
)
def test_wrong_overrides_are_named(overrides: dict[str, object], message: str) -> None:
    preset = "llama-tiny" if message.startswith("num_kv_heads") else "gpt2"
    with pytest.raises(ConfigError, match=message):
        create_config(preset, **overrides)


def test_unknown_presets_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'gpt5' is unknown.*gpt2-xl.*tiny"):
        create_config("gpt5")
