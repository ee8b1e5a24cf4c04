"""What a classifier's fine-tuning is asked for, works on and gives. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import RecipeError
from training.tasks.classification_data import Columns, Split
from training.tasks.classification_metrics import ClassificationReport


@dataclass(frozen=True, slots=True)
class FinetuneRequest:
    """`max_seq_len` cuts longer texts (None: at the model's context); `freeze_layers` counts from the embedding up.

    Raises RecipeError, naming the option, for values that cannot be run.
    """

    init_from: Path
    input: Path
    out: Path
    columns: Columns = field(default_factory=Columns)
    epochs: int = 3
    lr: float = 5e-5
    batch_size: int = 16
    weight_decay: float = 0.01
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0
    max_seq_len: int | None = None
    freeze_layers: int = 0
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("freeze_layers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"--{name.replace('_', '-')} is {getattr(self, name)} but must be at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0.0):
            raise RecipeError(f"--lr is {self.lr} but must be a positive number")


@dataclass(frozen=True, slots=True)
class Examples:
    """The texts of all parts as token ids, their labels as indices; `num_cut` were longer than the limit."""

    labels: tuple[str, ...]
    token_ids: list[list[int]]
    targets: list[int]
    split: Split
    num_cut: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """`train_loss` is the mean over the epoch's texts; without a validation part there is no report."""

    number: int
    step: int
    train_loss: float
    validation: ClassificationReport | None


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """`best` is the epoch whose weights were saved. A run that was stopped has no test report."""

    labels: tuple[str, ...]
    split: Split
    epochs: list[Epoch]
    best: Epoch
    test: ClassificationReport | None
    stopped: bool
    num_cut: int
    seconds: float
