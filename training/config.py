"""TrainConfig: one frozen tree of dataclasses that a TOML recipe and dotted overrides fill in.

    config = load_config(Path("training/configs/shakespeare.toml"), ["train.lr=3e-4", "run.dir=runs/a"])

Every field's help text stands beside it and is what `python -m training train --help` prints. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from training.errors import RecipeError


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the prepared tokens are."""

    dir: str = _option("", "folder written by `python -m training prepare`")
    verify: bool = _option(True, "check every shard's sha256 and token ids before the first step")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """The model: a preset, fields that replace the preset's, or an architecture with every size given.

    The vocabulary is the tokenizer's.
    """

    preset: str | None = _option(None, "name of a preset in model.presets")
    architecture: Literal["gpt2", "llama"] | None = _option(None, "family, when no preset is named")
    num_layers: int | None = _option(None, "transformer blocks")
    num_heads: int | None = _option(None, "query heads")
    num_kv_heads: int | None = _option(None, "key and value heads; num_heads must be a multiple of it")
    hidden_size: int | None = _option(None, "width of the residual stream")
    intermediate_size: int | None = _option(None, "inner width of the MLP")
    max_seq_len: int | None = _option(None, "context length in tokens")
    rope_theta: float | None = _option(None, "base of the rotary frequencies")
    dropout: float | None = _option(None, "dropout probability in training")
    tie_word_embeddings: bool | None = _option(None, "share the embedding and the output head")


@dataclass(frozen=True, slots=True)
class TrainSection:
    """The optimisation. Steps are optimiser steps; a step consumes batch_size * seq_len * grad_accum_steps tokens."""

    max_steps: int = _option(1_000, "optimiser steps in all")
    batch_size: int = _option(16, "sequences per rank and micro-step")
    seq_len: int = _option(256, "tokens per sequence")
    grad_accum_steps: int = _option(1, "micro-steps whose gradients make one step")
    lr: float = _option(1e-3, "peak learning rate")
    min_lr_ratio: float = _option(0.1, "last learning rate as a fraction of the peak")
    warmup_steps: int = _option(100, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "decay of matrices (vectors are not decayed)")
    beta1: float = _option(0.9, "AdamW's first moment decay")
    beta2: float = _option(0.95, "AdamW's second moment decay")
    eps: float = _option(1e-8, "AdamW's denominator floor")
    grad_clip: float = _option(1.0, "largest gradient norm; 0 = no clipping")
    seed: int = _option(1337, "seed of initialisation, data order and dropout")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("bfloat16", "autocast type; weights stay float32")
    compile: bool = _option(False, "run the model through torch.compile (needs a C++ compiler)")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    log_interval: int = _option(10, "steps between lines of training loss")
    eval_interval: int = _option(250, "steps between validations")
    eval_tokens: int = _option(1 << 20, "validation tokens read at most; 0 = the whole split")
    save_interval: int = _option(250, "steps between checkpoints")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What is written, and where."""

    dir: str = _option("", "run folder")
    save_dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "type of the saved checkpoints")
    keep: int = _option(2, "newest checkpoints/step-N folders kept; 0 = only last and best")
    sample_prompt: str = _option("\n", "prompt of the sample shown at validation")
    sample_tokens: int = _option(0, "tokens of the sample shown at validation; 0 = no sample")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole run. Raises RecipeError, naming the key, for values that cannot be run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSection = field(default_factory=ModelSection)
    train: TrainSection = field(default_factory=TrainSection)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.data.dir:
            raise RecipeError("data.dir is not set: name the folder that `python -m training prepare` wrote")
        if not self.run.dir:
            raise RecipeError("run.dir is not set: name the folder that the run shall be written to")
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self.train if name in _TRAIN_FIELDS else self.run, name)
            if not low <= value <= high:
                section = "train" if name in _TRAIN_FIELDS else "run"
                raise RecipeError(f"{section}.{name} is {value} but must lie between {low} and {high}")
        longest = self.model.max_seq_len
        if longest is not None and self.train.seq_len > longest:
            raise RecipeError(f"train.seq_len is {self.train.seq_len} but model.max_seq_len is only {longest}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step of one rank consumes."""
        return self.train.batch_size * self.train.seq_len * self.train.grad_accum_steps


_TRAIN_FIELDS = frozenset(item.name for item in fields(TrainSection))
_MANY = 10**12
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_steps": (1, _MANY), "batch_size": (1, _MANY), "seq_len": (1, _MANY), "grad_accum_steps": (1, _MANY),
    "lr": (0.0, 1e3), "min_lr_ratio": (0.0, 1.0), "warmup_steps": (0, _MANY), "weight_decay": (0.0, 1e3),
    "beta1": (0.0, 1.0 - 1e-9), "beta2": (0.0, 1.0 - 1e-9), "eps": (0.0, 1.0), "grad_clip": (0.0, 1e9),
    "seed": (0, 2**63 - 1), "log_interval": (1, _MANY), "eval_interval": (1, _MANY), "eval_tokens": (0, _MANY),
    "save_interval": (1, _MANY), "keep": (0, _MANY), "sample_tokens": (0, _MANY),
}  # fmt: skip
