"""A scaling exponent, tried on toys: loss ~ N^-alpha over models of a few thousand to a few hundred thousand.

Kaplan et al. 2020 (section 3.2) find 0.076 for models of up to 1.5 billion parameters, trained to convergence on a text
that does not run out. Models this small, trained for some hundred steps on a megabyte, show the direction and no more:
the exponent depends on how long they are trained and on the entropy that no model gets below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.training_command import prepare_data, run_recipe
from benchmarks.training_harness import Shape
from model.config import ModelConfig, count_parameters
from model.presets import create_config

KAPLAN_ALPHA = 0.076


@dataclass(frozen=True)
class PowerLaw:
    """loss = exp(intercept) * N^-alpha; `alpha_error` is one standard error, None for a fit through two points."""

    alpha: float
    alpha_error: float | None
    intercept: float

    def loss(self, size: float) -> float:
        return float(np.exp(self.intercept) * size**-self.alpha)


@dataclass(frozen=True)
class ScalingPlan:
    """`sizes` are (layers, heads, width); every model sees the same sequences in the same order."""

    sizes: tuple[tuple[int, int, int], ...]
    shape: Shape
    steps: int
    device: str
    threads: int


def make_plan(device: str, threads: int, *, quick: bool) -> ScalingPlan:
    if quick:
        return ScalingPlan(((1, 1, 8), (1, 1, 16), (1, 2, 32)), Shape(4, 32), 6, device, threads)
    sizes = ((1, 1, 16), (2, 1, 24), (2, 2, 48), (3, 2, 80), (4, 4, 128))
    return ScalingPlan(sizes, Shape(16, 128), 400, device, threads)


def fit_power_law(sizes: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Least squares in log-log. Needs two sizes; from three on there is an error."""
    logs = np.log(np.asarray(sizes, dtype=np.float64)), np.log(np.asarray(losses, dtype=np.float64))
    if len(sizes) == 2:
        slope, intercept = np.polyfit(*logs, 1)
        return PowerLaw(-float(slope), None, float(intercept))
    (slope, intercept), covariance = np.polyfit(*logs, 1, cov=True)
    return PowerLaw(-float(slope), float(np.sqrt(covariance[0, 0])), float(intercept))


def run_scaling(plan: ScalingPlan, text: Path, folder: Path, console: Console) -> dict[str, Any]:
    """Trains each size with the public command and fits the law. Raises SystemFailedError."""
    data = folder / "scaling-data"
    prepare_data(text, data, "char", plan.threads)
    rows = []
    for layers, heads, width in plan.sizes:
        recipe = _recipe(plan, data, layers, heads, width)
        figures = run_recipe(recipe, folder / f"scaling-{layers}-{width}", dropped=0, threads=plan.threads)
        size = non_embedding_parameters(_config(plan, layers, heads, width))
        rows.append({"layers": layers, "width": width, "parameters": size, "loss": figures.val_loss})
        console.print(f"{size:,} parameters: validation loss {figures.val_loss:.4f}", highlight=False)
    law = fit_power_law([row["parameters"] for row in rows], [row["loss"] for row in rows])
    print_scaling(console, plan, rows, law)
    fit = {"alpha": law.alpha, "alpha_error": law.alpha_error, "intercept": law.intercept, "kaplan": KAPLAN_ALPHA}
    return {"batch": str(plan.shape), "steps": plan.steps, "rows": rows, "fit": fit}


def non_embedding_parameters(config: ModelConfig) -> int:
    """Kaplan's N: everything but the token and position tables."""
    positions = config.max_seq_len if config.position == "learned" else 0
    return count_parameters(config) - (config.vocab_size + positions) * config.hidden_size


def _model_section(plan: ScalingPlan, layers: int, heads: int, width: int) -> dict[str, Any]:
    sizes = {"num_layers": layers, "num_heads": heads, "hidden_size": width, "max_seq_len": plan.shape.seq_len}
    return {"preset": "shakespeare-char", **sizes, "dropout": 0.0}


def _config(plan: ScalingPlan, layers: int, heads: int, width: int) -> ModelConfig:
    section = _model_section(plan, layers, heads, width)
    return create_config(section.pop("preset"), **section)


def _recipe(plan: ScalingPlan, data: Path, layers: int, heads: int, width: int) -> dict[str, Any]:
    # Narrow models take larger steps: the rate falls with the width, as under maximal update parametrisation.
    lr = min(1e-2, 0.32 / width)
    return {
        "data": {"dir": str(data.absolute())},
        "model": _model_section(plan, layers, heads, width),
        "train": {
            "batch_size": plan.shape.batch_size, "seq_len": plan.shape.seq_len, "device": plan.device,
            "max_steps": plan.steps, "warmup_steps": plan.steps // 10, "lr": lr, "dtype": "float32",
            "compile": False, "eval_interval": plan.steps, "save_interval": plan.steps,
        },
    }  # fmt: skip


def print_scaling(console: Console, plan: ScalingPlan, rows: Sequence[Mapping[str, Any]], law: PowerLaw) -> None:
    title = f"Loss by size: characters, {plan.steps} steps of {plan.shape} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("layers x width", "parameters without tables", "validation loss, nats", "of the fit"):
        table.add_column(column, justify="right")
    for row in rows:
        fitted = law.loss(row["parameters"])
        cells = f"{row['parameters']:,}", f"{row['loss']:.4f}", f"{fitted:.4f}"
        table.add_row(f"{row['layers']} x {row['width']}", *cells)
    console.print(table)
    error = "" if law.alpha_error is None else f" ± {law.alpha_error:.3f}"
    console.print(
        f"alpha = {law.alpha:.3f}{error} (Kaplan et al.: {KAPLAN_ALPHA}). This is a toy: tiny models, short runs, a "
        "small text; it can neither confirm nor refute the exponent.",
        highlight=False,
    )
