"""What the training benchmarks train: the same models in a recipe, in process and in nanoGPT. Free of torch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.presets import create_config


@dataclass(frozen=True)
class BenchModel:
    """`section` is the recipe's [model]; `vocab_size` belongs to the tokenizer, `vocab_multiple` pads it."""

    name: str
    section: Mapping[str, Any]
    tokenizer: str
    vocab_size: int
    vocab_multiple: int = 1

    def config(self, **changes: Any) -> ModelConfig:
        """The model without padding and dropout, for harnesses that build it themselves."""
        values = dict(self.section)
        preset = values.pop("preset")
        return create_config(preset, **(values | {"vocab_size": self.vocab_size, "dropout": 0.0} | changes))


# nanoGPT's GPT with its defaults: no biases, exact GELU, tied head. Without the position table 10.65M and 124M
# parameters (123.6M: no biases).
SHAKESPEARE_CHAR = BenchModel("10.65M characters", {"preset": "shakespeare-char"}, "char", 65)
GPT2 = BenchModel(
    "GPT-2 124M", {"preset": "gpt2", "bias": False, "activation": "gelu"}, "gpt2", 50_257, vocab_multiple=128
)
TINY = BenchModel(
    "tiny (--quick: says nothing)",
    {"preset": "shakespeare-char", "num_layers": 2, "num_heads": 2, "hidden_size": 32, "max_seq_len": 64},
    "char",
    65,
)

_CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def write_random_text(path: Path, characters: int) -> None:
    """A text with as many different characters as tinyshakespeare (65): its speed is that of any other."""
    rng = random.Random(0)
    path.write_text(_CHARACTERS + "".join(rng.choices(_CHARACTERS, k=characters)), encoding="utf-8")
