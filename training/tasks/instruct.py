"""Instruction tuning: examples out of conversations, then the trainer on them by the recipe `instruct`.

result = finetune(InstructRequest(Path("models/gpt2"), ("alpaca.json",), Path("runs/chat")), "auto", Console())
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from model.checkpoint import load_config as load_model_config
from model.checkpoint import load_model
from training.build import DTYPES
from training.checkpoint import has_state
from training.config import TrainConfig
from training.data.dataset import make_loader, open_dataset, open_split
from training.data.examples import ExampleSplit
from training.data.examples_loader import ExampleLoader
from training.distributed import Distributed, init_distributed
from training.errors import RecipeError
from training.evaluate_examples import evaluate_answers
from training.launch import one_voice
from training.metrics import read_metrics
from training.recipe import load_config
from training.run import run_on_rank
from training.run_folder import Resume
from training.tasks.instruct_data import InstructDataRequest, TemplateName, prepare_instructions

RECIPE = "instruct"
LR, LORA_LR = 2e-5, 2e-4
_LONGEST = 1_024  # of rows, unless the user asks for more
_OURS = ("data.dir", "run.dir", "model.init_from", "train.max_steps")


@dataclass(frozen=True, slots=True)
class InstructRequest:
    """What `finetune instruct` is asked for. `overrides` are keys of the recipe, `section.key=value`.

    `lr` None is 2e-5, or 2e-4 for adapters, which begin at nothing; `max_seq_len` None is the model's context, at most
    1,024.
    """

    init_from: Path
    inputs: tuple[str, ...]
    out: Path
    epochs: float = 2.0
    lr: float | None = None
    batch_size: int = 8
    max_seq_len: int | None = None
    template: TemplateName = "alpaca"
    packing: bool = False
    lora_rank: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    digests: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.epochs <= 1e6:
            raise RecipeError(f"--epochs is {self.epochs} but must be more than 0")
        for override in self.overrides:
            if override.partition("=")[0].strip() in _OURS:
                raise RecipeError(f"{override} cannot be set here; use --init-from, --out and --epochs")

    @property
    def data(self) -> InstructDataRequest:
        """Into the run folder; what a run that has not begun was to read may be replaced."""
        return InstructDataRequest(
            self.inputs, self.out / "data", str(self.init_from), self.template, self.val_fraction, self.test_fraction,
            self.digests, force=not has_state(self.out),
        )  # fmt: skip

    def config(self, *, seq_len: int, steps: int | None = None, steps_per_epoch: int | None = None) -> TrainConfig:
        """The recipe with what the options say; the overrides come last."""
        lr = self.lr if self.lr is not None else LORA_LR if self.lora_rank else LR
        values: dict[str, Any] = {
            "data.dir": self.out / "data",
            "data.loader": "packed" if self.packing else "padded",
            "model.init_from": self.init_from,
            "train.batch_size": self.batch_size,
            "train.seq_len": seq_len,
            "train.lr": lr,
            "train.lora_rank": self.lora_rank,
            "train.max_steps": steps,
            "train.eval_interval": steps_per_epoch,
            "run.dir": self.out,
        }
        given = [f"{key}={value}" for key, value in values.items() if value is not None]
        return load_config(RECIPE, [*given, *self.overrides])


@dataclass(frozen=True, slots=True)
class InstructResult:
    """Losses are nats a counted token of held-out answers: before the first step, at the best and the last validation,
    and of the best checkpoint on the test split. `finished` False: a signal stopped the run, which can go on."""

    finished: bool
    examples: dict[str, int]
    steps: int
    before: float | None
    best: float | None
    after: float | None
    test: float | None


def finetune(request: InstructRequest, resume: Resume, console: Console) -> InstructResult | None:
    """Prepares RUN/data and trains; called again, goes on where it stopped. Under torchrun all ranks call it.

    Returns the result on rank 0. Raises RecipeError, DataError, ResumeError or the model package's errors before
    anything that an earlier run wrote is replaced.
    """
    with one_voice():
        seq_len = _seq_len(request)
        distributed = init_distributed(request.config(seq_len=seq_len).train.device)
    with distributed.failing_together():
        if distributed.is_main:
            notice = lambda line: console.print(f"notice: {line}", style="yellow", markup=False, soft_wrap=True)  # noqa: E731
            prepare_instructions(request.data, on_notice=notice)
        distributed.from_main(0)  # the others wait for the data
        config, loader = _plan(request, seq_len, distributed)
        if distributed.is_main:
            _tell(loader, config, console)
        finished = run_on_rank(config, resume, console, distributed)
    return _result(config, finished, distributed) if distributed.is_main else None


def _seq_len(request: InstructRequest) -> int:
    """Raises RecipeError for more than the model's context."""
    context = load_model_config(request.init_from).max_seq_len
    if request.max_seq_len is None:
        return min(context, _LONGEST)
    if not 2 <= request.max_seq_len <= context:
        raise RecipeError(f"--max-seq-len is {request.max_seq_len} but must lie between 2 and the model's {context}")
    return request.max_seq_len


def _plan(request: InstructRequest, seq_len: int, distributed: Distributed) -> tuple[TrainConfig, ExampleLoader]:
    """The recipe with as many steps as the epochs have."""
    config = request.config(seq_len=seq_len)
    settings = config.train
    loader = make_loader(open_dataset(config.data), config.data, seq_len=settings.seq_len, seed=settings.seed)
    assert isinstance(loader, ExampleLoader)
    rows = settings.batch_size * settings.grad_accum_steps * distributed.world_size
    steps = max(1, math.ceil(request.epochs * loader.rows_per_epoch / rows))
    steps_per_epoch = max(1, math.ceil(loader.rows_per_epoch / rows))
    return request.config(seq_len=seq_len, steps=steps, steps_per_epoch=steps_per_epoch), loader


def _tell(loader: ExampleLoader, config: TrainConfig, console: Console) -> None:
    rows = loader.rows
    console.print(
        f"{rows.num_examples:,} examples in {len(rows):,} rows, {rows.targets.sum():,} tokens of answers; "
        f"{config.train.max_steps:,} steps", markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if rows.truncated or rows.left_out:
        console.print(
            f"notice: of the examples, {rows.truncated:,} are longer than {rows.seq_len} tokens and lose their end, "
            f"{rows.left_out:,} have their answer beyond it and are left out; --max-seq-len can raise that",
            style="yellow", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _result(config: TrainConfig, finished: bool, distributed: Distributed) -> InstructResult:
    run = Path(config.run.dir)
    losses = [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if line["split"] == "val"]
    values = [loss for _, loss in losses]
    splits = {name: open_split(Path(config.data.dir), name, verify=False) for name in _split_names(config)}
    return InstructResult(
        finished=finished,
        examples={name: len(split) for name, split in splits.items() if isinstance(split, ExampleSplit)},
        steps=config.train.max_steps,
        before=values[0] if losses and losses[0][0] == 0 else None,
        best=min(values, default=None),
        after=values[-1] if values else None,
        test=_test_loss(config, splits.get("test"), distributed.device) if finished else None,
    )


def _split_names(config: TrainConfig) -> Sequence[str]:
    from training.data.dataset import open_folder

    return open_folder(Path(config.data.dir)).split_names


def _test_loss(config: TrainConfig, split: object, device: torch.device) -> float | None:
    if not isinstance(split, ExampleSplit):
        return None
    model = load_model(Path(config.run.dir) / "checkpoints" / "best", dtype=torch.float32, device=device)
    settings = config.train
    autocast = None if settings.dtype == "float32" else DTYPES[settings.dtype]
    return evaluate_answers(
        model, split, seq_len=settings.seq_len, batch_size=settings.batch_size, autocast=autocast
    ).loss
