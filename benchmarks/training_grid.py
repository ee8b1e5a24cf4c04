"""Latency and throughput over batch and length, forward and training step, and what 16-bit types bring in each.

Forward: hidden states of all positions and the logits of the last, weights in the type named, nothing kept.
Training step: forward, backward, clipping, AdamW; weights float32, autocast to the type named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.training_harness import (
    DTYPES,
    BenchmarkError,
    Dtype,
    Shape,
    StepSettings,
    TrainingStep,
    median_seconds,
    release_memory,
    without_dropout,
)
from benchmarks.training_memory import kept_bytes
from benchmarks.training_models import GPT2, SHAKESPEARE_CHAR, TINY
from model.checkpoint import load_model
from model.config import ModelConfig
from model.presets import create_config
from model.transformer import Transformer

# S2's table of GPT-2 124M, milliseconds and tokens per second on an RTX 3090.
CLAIMED = {(1, 128): (12.3, 10_406), (1, 512): (45.7, 11_204), (8, 128): (58.4, 17_534), (8, 512): (215.3, 19_034)}
CLAIM = '"2x memory reduction", "1.5-2x training speedup" by FP16 (S2)'


@dataclass(frozen=True)
class GridPlan:
    name: str
    config: ModelConfig
    folder: Path | None
    shapes: tuple[Shape, ...]
    dtypes: tuple[Dtype, ...]
    warmup: int
    repeats: int
    device: str


def make_plan(device: str, *, quick: bool, preset: str | None, folder: Path | None) -> GridPlan:
    """`default_model` unless a preset or a checkpoint is named; the model package's errors for an unusable one."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16") if device == "cuda" else ("float32", "bfloat16")
    shapes = tuple(Shape(batch, length) for batch, length in CLAIMED)
    warmup, repeats = (5, 20) if device == "cuda" else (1, 5)
    if quick:
        shapes, warmup, repeats = (Shape(1, 16), Shape(4, 64)), 1, 2
    if folder is not None:
        name, config = folder.name, load_model(folder).config
    elif preset is not None:
        name, config = preset, create_config(preset)
    else:
        name, config = default_model(device, quick=quick)
    longest = max(shape.seq_len for shape in shapes)
    if config.max_seq_len < longest:
        raise BenchmarkError(f"{name} has a context of {config.max_seq_len} tokens; the grid needs {longest}")
    return GridPlan(name, without_dropout(config), folder, shapes, dtypes, warmup, repeats, device)


def default_model(device: str, *, quick: bool) -> tuple[str, ModelConfig]:
    """Name and configuration: GPT-2 124M, and on a CPU, which takes many minutes over it, 10.65M."""
    if quick:
        return TINY.name, TINY.config()
    if device == "cuda":
        return GPT2.name, GPT2.config()
    longest = max(length for _, length in CLAIMED)  # twice the model's own context
    return f"{SHAKESPEARE_CHAR.name}, context {longest}", SHAKESPEARE_CHAR.config(max_seq_len=longest)


def run_grid(plan: GridPlan, console: Console) -> dict[str, Any]:
    forward = [row for dtype in plan.dtypes for row in measure_forward(plan, dtype)]
    training = [measure_training(plan, dtype, shape) for dtype in plan.dtypes for shape in plan.shapes]
    add_speedups(forward)
    add_speedups(training)
    print_grid(console, plan, "forward", forward)
    print_grid(console, plan, "training step", training)
    return {"model": plan.name, "claim": CLAIM, "forward": forward, "training": training}


def measure_forward(plan: GridPlan, dtype: Dtype) -> list[dict[str, Any]]:
    """The grid's forward passes; `bytes` is what the weights take."""
    device = torch.device(plan.device)
    model = _make_model(plan).to(device=device, dtype=DTYPES[dtype]).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rows = []
    for shape in plan.shapes:
        ids = torch.zeros(shape.batch_size, shape.seq_len, dtype=torch.int64, device=device)

        def run(ids: torch.Tensor = ids) -> torch.Tensor:
            return model.compute_logits(model(ids)[:, -1])

        with torch.inference_mode():
            seconds = median_seconds(run, device, warmup=plan.warmup, repeats=plan.repeats)
        rows.append(_row(dtype, shape, seconds, weights))
    release_memory()
    return rows


def measure_training(plan: GridPlan, dtype: Dtype, shape: Shape) -> dict[str, Any]:
    """One cell of the grid's training steps; `bytes` is what autograd keeps between forward and backward."""
    device = torch.device(plan.device)
    step = TrainingStep(plan.config, shape, StepSettings(dtype), device)
    seconds = median_seconds(step, device, warmup=plan.warmup, repeats=plan.repeats)
    row = _row(dtype, shape, seconds, kept_bytes(step.model, step.loss))
    del step
    release_memory()
    return row


def _make_model(plan: GridPlan) -> Transformer:
    if plan.folder is not None:
        return load_model(plan.folder)
    model = Transformer(plan.config)
    model.init_weights(0)
    return model


def _row(dtype: Dtype, shape: Shape, seconds: float, size: int) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "batch_size": shape.batch_size,
        "seq_len": shape.seq_len,
        "ms": 1e3 * seconds,
        "tokens_per_second": shape.tokens / seconds,
        "bytes": size,
    }


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """To each row: float32's time over its own, and its bytes over float32's, at the same batch and length."""
    base = {(row["batch_size"], row["seq_len"]): row for row in rows if row["dtype"] == "float32"}
    for row in rows:
        float32 = base[row["batch_size"], row["seq_len"]]
        row["speedup"], row["memory"] = float32["ms"] / row["ms"], row["bytes"] / float32["bytes"]


def _is_gpt2(config: ModelConfig) -> bool:
    size = GPT2.config()
    return (config.num_layers, config.hidden_size) == (size.num_layers, size.hidden_size)


def print_grid(console: Console, plan: GridPlan, what: str, rows: Sequence[Mapping[str, Any]]) -> None:
    size = "weights, MiB" if what == "forward" else "kept for backward, MiB"
    table = Table(title=f"Grid, {plan.name}, {what}, {plan.device}", title_justify="left")
    for column in ("type", "batch x length", "ms", "tokens/s", "× float32", size, "of float32's", "S2 on an RTX 3090"):
        table.add_column(column, justify="left" if column == "type" else "right")
    published = CLAIMED if _is_gpt2(plan.config) else {}
    for row in rows:
        claimed = published.get((row["batch_size"], row["seq_len"]))
        table.add_row(
            row["dtype"], str(Shape(row["batch_size"], row["seq_len"])), f"{row['ms']:,.1f}",
            f"{row['tokens_per_second']:,.0f}", f"{row['speedup']:.2f}", f"{row['bytes'] / (1 << 20):,.1f}",
            f"{row['memory']:.0%}", f"{claimed[0]} ms, {claimed[1]:,}/s" if claimed else "–",
        )  # fmt: skip
    console.print(table)
    console.print(f"Published elsewhere: {CLAIM}", markup=False, highlight=False)
