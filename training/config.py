"""TrainConfig: one frozen tree of dataclasses that a TOML recipe and dotted overrides fill in.

    config = load_config("shakespeare", ["train.lr=3e-4", "run.dir=runs/a"])

Every field's help and bounds stand beside it: `python -m training train --help` prints them, `python -m training
recipe NAME` writes them into a file. Free of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from training.errors import RecipeError

Bounds = tuple[float, float]

_MANY = 10**12
_NEARLY_ONE = 1.0 - 1e-9
_COUNT = (0, _MANY)
_POSITIVE = (1, _MANY)
_BELOW_ONE = (0.0, _NEARLY_ONE)


def _option(default: Any, help_text: str, between: Bounds | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "between": between})


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the prepared tokens are, and how sequences are cut from them."""

    dir: str = _option("", "folder written by `python -m training prepare`, or one of nanoGPT's or llm.c's .bin files")
    tokenizer: str = _option("gpt2", "tokenizer of raw .bin files: gpt2, bytes, or a tokenizer.json or its folder")
    loader: Literal["packed", "sliding", "padded"] = _option(
        "packed", "packed: sequences lie side by side; sliding: each starts data.stride tokens after the last. Of "
        "examples, packed: as many to a sequence as fit; padded: one",
    )  # fmt: skip
    stride: int = _option(
        0, "tokens between the starts of sliding sequences, at most train.seq_len; 0 = half of it", _COUNT
    )
    verify: bool = _option(True, "compare every shard's sha256 and token ids before the first step")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """A folder to start from, a preset whose fields may be replaced, or an architecture with every size.

    The vocabulary is the tokenizer's. Sizes have no bounds here: model.config.ModelConfig checks them.
    """

    init_from: str | None = _option(
        None, "folder in Hugging Face's format, or a name on the Hub, to start from; it also decides sizes and dropout"
    )
    preset: str | None = _option(None, "a shape by name, such as gpt2, gpt2-medium, llama-tiny or shakespeare-char")
    architecture: Literal["gpt2", "openai-gpt", "llama", "mistral", "qwen2", "qwen3"] | None = _option(
        None, "family, where no preset is named; decides the class that loads the checkpoints"
    )
    num_layers: int | None = _option(None, "transformer blocks")
    num_heads: int | None = _option(None, "query heads")
    num_kv_heads: int | None = _option(None, "key and value heads, a divisor of num_heads; not set = num_heads")
    hidden_size: int | None = _option(None, "width of the residual stream, a multiple of num_heads")
    intermediate_size: int | None = _option(
        None, "inner width of the MLP; not set = 4 times hidden_size, 8/3 times where the MLP is gated"
    )
    max_seq_len: int | None = _option(None, "context: the most tokens the model can attend to")
    rope_theta: float | None = _option(None, "base of the rotary frequencies; not set = 10000")
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] | None = _option(None, "the MLP's non-linearity")
    bias: bool | None = _option(None, "biases of the products and layer norms, where the family has them")
    sliding_window: int | None = _option(
        None, "tokens that attention looks back, itself included (mistral, qwen); not set = all"
    )
    dropout: float | None = _option(None, "probability that a value is dropped in training")
    tie_word_embeddings: bool | None = _option(None, "use the embedding as the output head too")
    vocab_multiple: int = _option(
        1, "round the vocabulary up to a multiple for speed; 128 makes GPT-2's 50,304. Checkpoints leave the rest out",
        (1, 1 << 16),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainSection:
    """The optimisation. A step is an optimiser step: batch_size * seq_len * grad_accum_steps tokens on each rank."""

    max_steps: int = _option(1_000, "optimiser steps of the whole run; the schedule ends there", _POSITIVE)
    batch_size: int = _option(16, "sequences per rank and micro-step: more need more memory", _POSITIVE)
    seq_len: int = _option(256, "tokens per sequence, at most the model's context", _POSITIVE)
    grad_accum_steps: int = _option(1, "micro-steps per rank whose gradients make one step", _POSITIVE)
    optimizer: Literal["adamw", "muon"] = _option(
        "adamw", "adamw for all weights; muon for the layers' matrices and adamw for the rest"
    )
    lr: float = _option(1e-3, "peak learning rate of AdamW", (0.0, 1e3))
    muon_lr: float = _option(0.02, "peak learning rate of Muon", (0.0, 1e3))
    muon_momentum: float = _option(0.95, "Muon's momentum", _BELOW_ONE)
    schedule: Literal["cosine", "wsd", "linear", "constant"] = _option(
        "cosine", "course of the learning rates after warm-up; wsd holds the peak, then decays"
    )
    min_lr_ratio: float = _option(0.1, "last learning rate as a fraction of the peak", (0.0, 1.0))
    warmup_steps: int = _option(
        100, "steps in which the learning rates rise to their peak; a shorter run ends before it", _COUNT
    )
    decay_fraction: float = _option(0.2, "share of max_steps in which wsd decays", (0.0, 1.0))
    weight_decay: float = _option(
        0.1, "decay of matrices per step, times the learning rate; vectors have none", (0.0, 1e3)
    )
    beta1: float = _option(0.9, "AdamW's decay of the mean gradient", _BELOW_ONE)
    beta2: float = _option(0.95, "AdamW's decay of the mean squared gradient", _BELOW_ONE)
    eps: float = _option(1e-8, "AdamW's floor of the denominator", (0.0, 1.0))
    grad_clip: float = _option(1.0, "largest norm of the gradient, longer ones are scaled down; 0 = off", (0.0, 1e9))
    label_smoothing: float = _option(
        0.0, "probability spread over the whole vocabulary in the training loss", _BELOW_ONE
    )
    z_loss: float = _option(0.0, "weight of the squared log-normaliser in the training loss", (0.0, 1.0))
    max_skipped_steps: int = _option(
        5, "steps in a row that are skipped because the loss or gradient is not finite, before the run ends", _COUNT
    )
    seed: int = _option(1337, "seed of the first weights, the order of the data and dropout", (0, 2**63 - 1))
    dtype: Literal["float32", "bfloat16", "float16"] = _option(
        "bfloat16", "type of products (autocast); weights stay float32, float16 scales the loss"
    )
    lora_rank: int = _option(
        0, "train low-rank adapters of this rank on the layers' matrices instead of the weights; 0 = all weights",
        (0, 1 << 16),
    )  # fmt: skip
    lora_alpha: float = _option(16.0, "the adapters' products are scaled by lora_alpha / lora_rank", (1e-6, 1e6))
    tf32: bool = _option(True, "on CUDA, compute float32 products in TF32: faster, 10 bits of mantissa")
    compile: bool | None = _option(None, "run the model through torch.compile; not set = on CUDA only")
    activation_checkpointing: bool = _option(
        False, "keep no activations inside layers: less memory, one more forward pass"
    )
    parallel: Literal["ddp", "fsdp"] = _option("ddp", "under torchrun, ddp: whole weights on every rank; fsdp: a share")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N; auto = CUDA where there is one")
    log_interval: int = _option(10, "steps between lines of the training loss", _POSITIVE)
    eval_interval: int = _option(250, "steps between validations", _POSITIVE)
    eval_first: bool = _option(False, "validate before the first step too")
    eval_tokens: int = _option(1 << 20, "validation tokens read at most; 0 = the whole split", _COUNT)
    early_stopping: int = _option(0, "validations in a row without a new best that end the run; 0 = off", _COUNT)
    save_interval: int = _option(250, "steps between checkpoints, which a killed run goes on from", _POSITIVE)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What is written, and where."""

    dir: str = _option("", "run folder: checkpoints, metrics, report and what a continued run needs")
    save_dtype: Literal["float32", "bfloat16", "float16"] = _option(
        "float32", "type of the weights in checkpoints; 16 bits halve them. Continuing a run is exact all the same"
    )
    keep: int = _option(2, "newest checkpoints/step-N folders kept; 0 = only last and best", _COUNT)
    async_save: bool = _option(True, "write checkpoints while the next steps run")
    tensorboard: bool = _option(False, "also log for TensorBoard, in run.dir/tensorboard (extra `tensorboard`)")
    wandb: str = _option("", "also log to this project of Weights & Biases (extra `wandb`); empty = off")
    sample_prompt: str = _option("\n", "prompt of the sample shown at each validation")
    sample_tokens: int = _option(0, "tokens of that sample; 0 = no sample", _COUNT)


SECTIONS: dict[str, type] = {"data": DataConfig, "model": ModelSection, "train": TrainSection, "run": RunConfig}


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
        for key, value, (low, high) in _bounded_values(self):
            if not low <= value <= high:
                raise RecipeError(f"{key} is {value} but must lie between {low} and {high}")
        _check_lengths(self)
        _check_adapters(self)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step of one rank consumes."""
        return self.train.batch_size * self.train.seq_len * self.train.grad_accum_steps


def _bounded_values(config: TrainConfig) -> Iterator[tuple[str, float, Bounds]]:
    for section in SECTIONS:
        values = getattr(config, section)
        for item in dataclasses.fields(values):
            value, bounds = getattr(values, item.name), item.metadata["between"]
            if bounds is not None and value is not None:
                yield f"{section}.{item.name}", value, bounds


def _check_lengths(config: TrainConfig) -> None:
    """Keys that bound each other. What only the model or the data can tell is checked where they are opened."""
    data, seq_len, longest = config.data, config.train.seq_len, config.model.max_seq_len
    if longest is not None and seq_len > longest:
        raise RecipeError(f"train.seq_len is {seq_len} but model.max_seq_len is only {longest}")
    if data.stride and data.loader != "sliding":
        raise RecipeError(f"data.stride is {data.stride} but data.loader is {data.loader}; set data.loader=sliding")
    if data.stride > seq_len:
        raise RecipeError(
            f"data.stride is {data.stride} but train.seq_len only {seq_len}: the tokens between would never be read"
        )


def _check_adapters(config: TrainConfig) -> None:
    if not config.train.lora_rank:
        return
    if config.model.init_from is None:
        raise RecipeError("train.lora_rank is set but model.init_from is not: adapters need a trained model")
    if config.train.optimizer == "muon":
        raise RecipeError("train.lora_rank is set but train.optimizer is muon, which is not for adapters; use adamw")
