"""ModelConfig: one frozen description that covers every decoder this package runs.

Free of torch. Presets by name are in `model.presets`; Hugging Face's field names appear only in `model.hf_config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError

Architecture = Literal["gpt2", "openai-gpt", "llama", "mistral", "qwen2", "qwen3"]
Norm = Literal["layernorm", "rmsnorm"]
Position = Literal["learned", "rope"]
Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched by `factor`, short ones kept, the rest blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        if not _is_integer(self.original_max_seq_len) or self.original_max_seq_len < 1:
            raise ConfigError("rope_scaling.original_max_seq_len must be a positive integer")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            if not _is_positive_number(getattr(self, name)):
                raise ConfigError(f"rope_scaling.{name} must be a positive number")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError("rope_scaling.high_freq_factor must exceed low_freq_factor")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and switches of a decoder-only transformer.

    `architecture` names the family, which decides the checkpoint format. `norm_first` is False only for GPT-1,
    which normalises after each residual sum and has no final norm. `sliding_window` limits how many tokens back
    (itself included) a token may look. `dropout` acts in training only.
    Raises ConfigError, naming the field, for values that cannot be run.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_seq_len: int
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    norm_first: bool = True
    position: Position = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    activation: Activation = "gelu_tanh"
    gated_mlp: bool = False
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    qk_norm: bool = False
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_heads must be a multiple of num_kv_heads")
        if self.position == "rope" and self.head_dim % 2:
            raise ConfigError("head_dim must be even for rotary positions")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError("sliding_window must be positive or null")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


_POSITIVE_FIELDS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "max_seq_len",
)  # fmt: skip
_CHOICE_FIELDS: dict[str, tuple[str, ...]] = {
    "architecture": get_args(Architecture),
    "norm": get_args(Norm),
    "position": get_args(Position),
    "activation": get_args(Activation),
}
_SWITCH_FIELDS = (
    "norm_first", "gated_mlp", "qkv_bias", "o_bias", "mlp_bias", "norm_bias", "qk_norm", "tie_word_embeddings",
)  # fmt: skip


def _check_types(config: ModelConfig) -> None:
    """Values come from JSON and from command lines, so the annotations alone promise nothing."""
    for name in _POSITIVE_FIELDS:
        if not _is_integer(value := getattr(config, name)) or value < 1:
            raise ConfigError(f"{name} must be a positive integer")
    for name, choices in _CHOICE_FIELDS.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}")
    for name in _SWITCH_FIELDS:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be true or false")
    for name in ("norm_eps", "rope_theta"):
        if not _is_positive_number(getattr(config, name)):
            raise ConfigError(f"{name} must be a positive number")
    if not (_is_number(config.dropout) and 0.0 <= config.dropout < 1.0):
        raise ConfigError("dropout must lie in [0, 1)")
    if config.sliding_window is not None and not _is_integer(config.sliding_window):
        raise ConfigError("sliding_window must be positive or null")
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        ids = value if name == "eos_token_id" and isinstance(value, tuple) else () if value is None else (value,)
        if not all(_is_integer(token_id) and token_id >= 0 for token_id in ids):
            raise ConfigError(f"{name} must be a token id or null")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive_number(value: float) -> bool:
    return _is_number(value) and value > 0.0 and math.isfinite(value)


def count_parameters(config: ModelConfig) -> int:
    """Learned values of the model, in closed form; a tied head counts once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv_rows = config.q_size + 2 * config.kv_size
    up_rows = (2 if config.gated_mlp else 1) * inner
    norm = hidden * (2 if config.norm == "layernorm" and config.norm_bias else 1)
    layer = (qkv_rows + config.q_size + up_rows + inner) * hidden + 2 * norm
    layer += qkv_rows * config.qkv_bias + hidden * config.o_bias + (up_rows + hidden) * config.mlp_bias
    layer += 2 * config.head_dim * config.qk_norm
    tables = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    tables += config.max_seq_len if config.position == "learned" else 0
    return config.num_layers * layer + tables * hidden + norm * config.norm_first


def gpt2_config(
    num_layers: int, num_heads: int, hidden_size: int, *, vocab_size: int = 50_257, max_seq_len: int = 1_024
) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): pre-norm, learned positions, tanh-GELU, tied head."""
    return ModelConfig(
        architecture="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        max_seq_len=max_seq_len,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
    )


def llama_config(
    num_layers: int, num_heads: int, num_kv_heads: int, hidden_size: int, intermediate_size: int,
    *, vocab_size: int = 50_257, max_seq_len: int = 1_024, tie_word_embeddings: bool = True,
) -> ModelConfig:  # fmt: skip
    """Llama (Touvron et al. 2023): pre-RMSNorm, rotary positions, grouped queries, SwiGLU, no biases."""
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate_size,
        max_seq_len=max_seq_len,
        norm="rmsnorm",
        position="rope",
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        norm_bias=False,
        tie_word_embeddings=tie_word_embeddings,
    )
