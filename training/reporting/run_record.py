"""A run folder as a reader sees it: the resolved recipe, the metrics, and what the checkpoints say of themselves."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch

from model.checkpoint import load_config, read_manifest
from model.config import ModelConfig
from model.errors import QuillError
from model.manifest import Provenance
from model.transformer import Transformer
from training.errors import RecipeError
from training.metrics import read_metrics

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """`train` and `val` are lines of metrics.jsonl with a loss, in order of their steps."""

    folder: Path
    config_toml: str
    config: Mapping[str, Mapping[str, Any]]
    train: tuple[Line, ...]
    val: tuple[Line, ...]
    provenance: Provenance
    model: ModelConfig | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def run_id(self) -> str:
        return self.provenance.run or self.name

    @property
    def step(self) -> int:
        """The last step with a line in metrics.jsonl; 0 before the first."""
        return max((lines[-1]["step"] for lines in (self.train, self.val) if lines), default=0)

    @property
    def tokens(self) -> int | None:
        """Tokens trained on up to `step`."""
        return next((line["tokens"] for line in reversed(self.train) if is_number(line.get("tokens"))), None)

    @property
    def best(self) -> Line | None:
        """The validation with the lowest loss; the first of equal ones."""
        return min(self.val, key=lambda line: line["loss"], default=None)

    @cached_property
    def parameters(self) -> int | None:
        """Weights of the model, None before the first checkpoint. Nothing is allocated."""
        if self.model is None:
            return None
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Transformer(self.model).parameters())

    @property
    def seconds(self) -> float | None:
        """Time in training steps, from the tokens and speeds of the logged lines."""
        total, before = 0.0, 0.0
        for line in self.train:
            tokens, speed = line.get("tokens"), line.get("tokens_per_second")
            if is_number(tokens) and is_number(speed) and speed > 0:
                total, before = total + (tokens - before) / speed, tokens
        return total or None

    @property
    def status(self) -> str:
        """Where the run stands, as a phrase."""
        settings = self.config.get("train", {})
        last, patience = settings.get("max_steps"), settings.get("early_stopping", 0)
        if not isinstance(last, int):
            return f"at step {self.step:,}"
        place = f"step {self.step:,} of {last:,}"
        if self.step >= last:
            return f"finished, {place}"
        if patience and self._validations_since_best >= patience:
            return f"ended early, {place}: no better validation in {patience}"
        return f"not finished, {place}" if self.step else f"not begun, {place}"

    @property
    def _validations_since_best(self) -> int:
        best = self.best
        return 0 if best is None else sum(line["step"] > best["step"] for line in self.val)

    def summary(self) -> dict[str, Any]:
        """The run in a few plain values, for machines."""
        best = self.best or {}
        return {
            "run_dir": str(self.folder), "run_id": self.run_id, "status": self.status, "step": self.step,
            "max_steps": self.config.get("train", {}).get("max_steps"), "tokens": self.tokens,
            "parameters": self.parameters, "data": self.provenance.data, "best_step": best.get("step"),
            "best_loss": best.get("loss"), "perplexity": finite(best.get("perplexity")),
            "bits_per_byte": finite(best.get("bits_per_byte")), "train_seconds": self.seconds,
        }  # fmt: skip


def read_run(folder: Path) -> RunRecord:
    """Raises RecipeError for a folder that holds no run. A run that has only begun is a run."""
    path = folder / "config.toml"
    try:
        text = path.read_text(encoding="utf-8")
        config = tomllib.loads(text)
    except FileNotFoundError:
        raise RecipeError(
            f"{folder}: not a run folder, it has no config.toml; name the run.dir of a training"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: not a readable TOML file ({error}); restore it from the recipe") from None
    sections = {name: values for name, values in config.items() if isinstance(values, Mapping)}
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if is_number(line.get("loss"))]
    lines.sort(key=lambda line: int(line["step"]))
    provenance, model = _from_checkpoints(folder / "checkpoints")
    return RunRecord(
        folder, text, sections, tuple(line for line in lines if line.get("split") == "train"),
        tuple(line for line in lines if line.get("split") == "val"), provenance, model,
    )  # fmt: skip


def _from_checkpoints(checkpoints: Path) -> tuple[Provenance, ModelConfig | None]:
    """What the last whole checkpoint knows; a report does without where there is none or it is damaged."""
    for name in ("last", "best"):
        try:
            manifest = read_manifest(checkpoints / name)
            if manifest is not None:
                return manifest.provenance, load_config(checkpoints / name)
        except (QuillError, OSError):
            continue
    return Provenance(), None


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def finite(value: Any) -> Any:
    """The value if it is a number, else None."""
    return value if is_number(value) else None
