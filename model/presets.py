"""Model shapes by name, and `create_config` to vary them. Free of torch."""

from __future__ import annotations

from dataclasses import fields, replace

from model.config import ModelConfig, gpt2_config, llama_config
from model.errors import ConfigError


def _gpt1() -> ModelConfig:
    """GPT-1 (Radford et al. 2018): post-norm, no final norm, 512 positions."""
    config = gpt2_config(12, 12, 768, vocab_size=40_478, max_seq_len=512)
    return replace(config, architecture="openai-gpt", norm_first=False, bos_token_id=None, eos_token_id=None)


def _llama(
    num_layers: int, num_heads: int, num_kv_heads: int, hidden_size: int, vocab_size: int, max_seq_len: int
) -> ModelConfig:
    config = llama_config(
        num_layers, num_heads, num_kv_heads, hidden_size, 4 * hidden_size,
        vocab_size=vocab_size, max_seq_len=max_seq_len,
    )  # fmt: skip
    return replace(config, norm_eps=1e-6, dropout=0.1)


def _shakespeare_char() -> ModelConfig:
    """The usual small model for character-level text: 10.65M parameters besides the positions, no biases."""
    config = gpt2_config(6, 6, 384, vocab_size=65, max_seq_len=256)
    return replace(
        config, activation="gelu", dropout=0.2, bos_token_id=None, eos_token_id=None,
        qkv_bias=False, o_bias=False, mlp_bias=False, norm_bias=False,
    )  # fmt: skip


_BIAS_FIELDS = ("qkv_bias", "o_bias", "mlp_bias", "norm_bias")

PRESETS: dict[str, ModelConfig] = {
    "gpt2": gpt2_config(12, 12, 768),
    "gpt2-medium": gpt2_config(24, 16, 1_024),
    "gpt2-large": gpt2_config(36, 20, 1_280),
    "gpt2-xl": gpt2_config(48, 25, 1_600),
    "gpt2-untied": replace(gpt2_config(12, 12, 768), tie_word_embeddings=False),
    "openai-gpt": _gpt1(),
    "llama-tiny": _llama(4, 4, 2, 256, 8_192, 128),
    "llama-small": _llama(6, 6, 3, 384, 8_192, 256),
    "llama-medium": _llama(12, 12, 4, 768, 16_384, 512),
    "llama-large": _llama(24, 16, 4, 1_024, 32_768, 1_024),
    "shakespeare-char": _shakespeare_char(),
}
PRESET_ALIASES = {size: f"llama-{size}" for size in ("tiny", "small", "medium", "large")}


def create_config(preset: str, **overrides: object) -> ModelConfig:
    """A preset with some fields replaced; sizes that follow from others (see `_follow`) keep the preset's ratios.

    `bias` sets all four bias switches at once. Raises ConfigError for an unknown preset or field, and for values
    that cannot be run.
    """
    base = PRESETS.get(PRESET_ALIASES.get(preset, preset))
    if base is None:
        raise ConfigError(f"preset {preset!r} is unknown; choose one of {', '.join([*PRESETS, *PRESET_ALIASES])}")
    if "bias" in overrides:
        bias = overrides.pop("bias")
        overrides = dict.fromkeys(_BIAS_FIELDS, bias) | overrides
    known = [field.name for field in fields(ModelConfig)]
    for name in overrides:
        if name not in known:
            raise ConfigError(f"{name} is not a field of a model; choose among {', '.join([*known, 'bias'])}")
    return replace(base, **_follow(base, overrides), **overrides)  # type: ignore[arg-type]


def _follow(base: ModelConfig, overrides: dict[str, object]) -> dict[str, object]:
    """Values for the fields that the overrides leave open but that depend on them.

    head_dim = hidden_size / num_heads; intermediate_size and num_kv_heads keep their ratio to hidden_size and
    num_heads; special tokens beyond a smaller vocabulary are dropped.
    """
    derived: dict[str, object] = {}
    hidden, heads = (_positive(base, overrides, name) for name in ("hidden_size", "num_heads"))
    if heads != base.num_heads and "num_kv_heads" not in overrides:
        derived["num_kv_heads"] = _scaled("num_kv_heads", base.num_kv_heads, heads, base.num_heads)
    if (hidden, heads) != (base.hidden_size, base.num_heads) and "head_dim" not in overrides:
        if hidden % heads:
            raise ConfigError("hidden_size must be a multiple of num_heads, or head_dim must be given")
        derived["head_dim"] = hidden // heads
    if hidden != base.hidden_size and "intermediate_size" not in overrides:
        derived["intermediate_size"] = _scaled("intermediate_size", base.intermediate_size, hidden, base.hidden_size)
    vocab_size = _positive(base, overrides, "vocab_size")
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(base, name)
        if isinstance(value, int) and value >= vocab_size and name not in overrides:
            derived[name] = None
    return derived


def _positive(base: ModelConfig, overrides: dict[str, object], name: str) -> int:
    value = overrides.get(name, getattr(base, name))
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer")
    return value


def _scaled(name: str, value: int, numerator: int, denominator: int) -> int:
    result, rest = divmod(value * numerator, denominator)
    if rest:
        raise ConfigError(f"{name} must be given: the preset's ratio does not come out whole")
    return result
