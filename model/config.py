"""ModelConfig: one frozen description that covers every decoder this package runs, and the presets by name.

Free of torch. Hugging Face's field names appear only in `model.hf_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
        for name in _POSITIVE_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_heads must be a multiple of num_kv_heads")
        if self.position == "rope" and self.head_dim % 2:
            raise ConfigError("head_dim must be even for rotary positions")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError("dropout must lie in [0, 1)")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError("sliding_window must be positive or null")
        if not self.norm_eps > 0.0:
            raise ConfigError("norm_eps must be positive")

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
