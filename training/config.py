"""TrainConfig: one frozen tree of dataclasses that a TOML recipe and dotted overrides fill in.

    config = load_config(Path("training/configs/shakespeare.toml"), ["train.lr=3e-4", "run.dir=runs/a"])

Every field's help text stands beside it and is what `python -m training train --help` prints. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from training.errors import RecipeError


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the prepared tokens are."""

    dir: str = _option("", "folder written by `python -m training prepare`, or one of nanoGPT's or llm.c's .bin files")
    tokenizer: str = _option("gpt2", "tokenizer of raw .bin files: gpt2, bytes, or a tokenizer.json or its folder")
    loader: Literal["packed", "sliding"] = _option("packed", "packed: windows side by side; sliding: they overlap")
    stride: int = _option(0, "tokens between the starts of sliding windows; 0 = half a window")
    verify: bool = _option(True, "check every shard's sha256 and token ids before the first step")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """The model: a preset, fields that replace the preset's, or an architecture with every size given.

    The vocabulary is the tokenizer's.
    """

    init_from: str | None = _option(None, "Hugging Face folder whose weights training starts from; it gives the sizes")
    preset: str | None = _option(None, "name of a preset in model.presets")
    architecture: Literal["gpt2", "openai-gpt", "llama", "mistral", "qwen2", "qwen3"] | None = _option(
        None, "family, when no preset is named"
    )
    num_layers: int | None = _option(None, "transformer blocks")
    num_heads: int | None = _option(None, "query heads")
    num_kv_heads: int | None = _option(None, "key and value heads; num_heads must be a multiple of it")
    hidden_size: int | None = _option(None, "width of the residual stream")
    intermediate_size: int | None = _option(None, "inner width of the MLP")
    max_seq_len: int | None = _option(None, "context length in tokens")
    rope_theta: float | None = _option(None, "base of the rotary frequencies")
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] | None = _option(None, "the MLP's non-linearity")
    bias: bool | None = _option(None, "biases of products and layer norms")
    sliding_window: int | None = _option(None, "tokens that attention looks back; not set = all")
    dropout: float | None = _option(None, "dropout probability in training")
    tie_word_embeddings: bool | None = _option(None, "share the embedding and the output head")
    vocab_multiple: int = _option(1, "round the vocabulary up to a multiple; 128 makes GPT-2's 50,304")


@dataclass(frozen=True, slots=True)
class TrainSection:
    """The optimisation. Steps are optimiser steps; a step consumes batch_size * seq_len * grad_accum_steps tokens."""

    max_steps: int = _option(1_000, "optimiser steps in all")
    batch_size: int = _option(16, "sequences per rank and micro-step")
    seq_len: int = _option(256, "tokens per sequence")
    grad_accum_steps: int = _option(1, "micro-steps whose gradients make one step")
    optimizer: Literal["adamw", "muon"] = _option("adamw", "muon: matrices by Muon, the rest by AdamW")
    lr: float = _option(1e-3, "peak learning rate of AdamW")
    muon_lr: float = _option(0.02, "peak learning rate of Muon")
    muon_momentum: float = _option(0.95, "Muon's momentum")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = _option("cosine", "course of the rate after warm-up")
    min_lr_ratio: float = _option(0.1, "last learning rate as a fraction of the peak")
    warmup_steps: int = _option(100, "steps of linear warm-up")
    decay_fraction: float = _option(0.2, "share of the steps in which wsd decays")
    weight_decay: float = _option(0.1, "decay of matrices (vectors are not decayed)")
    beta1: float = _option(0.9, "AdamW's first moment decay")
    beta2: float = _option(0.95, "AdamW's second moment decay")
    eps: float = _option(1e-8, "AdamW's denominator floor")
    grad_clip: float = _option(1.0, "largest gradient norm; 0 = no clipping")
    label_smoothing: float = _option(0.0, "probability spread over all tokens in the training loss")
    z_loss: float = _option(0.0, "weight of the squared log-normaliser in the training loss")
    max_skipped_steps: int = _option(5, "steps in a row with a loss or gradient that is no number before the run ends")
    seed: int = _option(1337, "seed of initialisation, data order and dropout")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("bfloat16", "autocast type; weights stay float32")
    tf32: bool = _option(True, "on CUDA, float32 products in TF32")
    compile: bool | None = _option(None, "run the model through torch.compile; not set = on CUDA only")
    activation_checkpointing: bool = _option(False, "keep no activations inside layers: less memory, more time")
    parallel: Literal["ddp", "fsdp"] = _option("ddp", "under torchrun: whole weights on each rank, or a share")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    log_interval: int = _option(10, "steps between lines of training loss")
    eval_interval: int = _option(250, "steps between validations")
    eval_tokens: int = _option(1 << 20, "validation tokens read at most; 0 = the whole split")
    early_stopping: int = _option(0, "end after so many validations in a row without a new best; 0 = never")
    save_interval: int = _option(250, "steps between checkpoints")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What is written, and where."""

    dir: str = _option("", "run folder")
    save_dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "type of the saved checkpoints")
    keep: int = _option(2, "newest checkpoints/step-N folders kept; 0 = only last and best")
    async_save: bool = _option(True, "write checkpoints beside the next steps")
    tensorboard: bool = _option(False, "also log for TensorBoard, in run.dir/tensorboard (extra `tensorboard`)")
    wandb: str = _option("", "also log to this project of Weights & Biases (extra `wandb`)")
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
        for key, (low, high) in _BOUNDS.items():
            section, _, name = key.partition(".")
            value = getattr(getattr(self, section), name)
            if not low <= value <= high:
                raise RecipeError(f"{key} is {value} but must lie between {low} and {high}")
        longest = self.model.max_seq_len
        if longest is not None and self.train.seq_len > longest:
            raise RecipeError(f"train.seq_len is {self.train.seq_len} but model.max_seq_len is only {longest}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step of one rank consumes."""
        return self.train.batch_size * self.train.seq_len * self.train.grad_accum_steps


_MANY = 10**12
_NEARLY_ONE = 1.0 - 1e-9
_BOUNDS: dict[str, tuple[float, float]] = {
    "data.stride": (0, _MANY), "model.vocab_multiple": (1, 1 << 16),
    "train.max_steps": (1, _MANY), "train.batch_size": (1, _MANY), "train.seq_len": (1, _MANY),
    "train.grad_accum_steps": (1, _MANY), "train.lr": (0.0, 1e3), "train.muon_lr": (0.0, 1e3),
    "train.muon_momentum": (0.0, _NEARLY_ONE), "train.min_lr_ratio": (0.0, 1.0), "train.warmup_steps": (0, _MANY),
    "train.decay_fraction": (0.0, 1.0), "train.weight_decay": (0.0, 1e3), "train.beta1": (0.0, _NEARLY_ONE),
    "train.beta2": (0.0, _NEARLY_ONE), "train.eps": (0.0, 1.0), "train.grad_clip": (0.0, 1e9),
    "train.label_smoothing": (0.0, _NEARLY_ONE), "train.z_loss": (0.0, 1.0), "train.max_skipped_steps": (0, _MANY),
    "train.seed": (0, 2**63 - 1), "train.log_interval": (1, _MANY), "train.eval_interval": (1, _MANY),
    "train.eval_tokens": (0, _MANY), "train.early_stopping": (0, _MANY), "train.save_interval": (1, _MANY),
    "run.keep": (0, _MANY), "run.sample_tokens": (0, _MANY),
}  # fmt: skip
