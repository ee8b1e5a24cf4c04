"""A ladder of speed-ups on one model: each rung adds one thing to the last, and the top is our trainer.

The rungs below the top run in this process: the same Transformer and loss, AdamW from torch. The top is the public
command with the same model and batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.summary import median
from benchmarks.systems import SystemFailedError
from benchmarks.training_command import prepare_data, run_recipe
from benchmarks.training_harness import (
    Shape,
    StepSettings,
    TrainingStep,
    float32_products,
    median_seconds,
    release_memory,
)
from benchmarks.training_models import GPT2, TINY, BenchModel, write_random_text

FINAL = "ours: python -m training train"


@dataclass(frozen=True)
class Rung:
    """`claim` is the published figure: tokens/s of a logged run on an unnamed GPU at 16 x 1,024, or words of theirs."""

    name: str
    settings: StepSettings
    products: Literal["highest", "high"] = "highest"
    padded: bool = False
    cuda_only: bool = False
    claim: str = ""


RUNGS = (
    Rung("float32", StepSettings(fused=False), claim="15.7K tokens/s"),
    Rung("+ TF32", StepSettings(fused=False), "high", cuda_only=True, claim="46.1K tokens/s"),
    Rung("+ bf16 autocast", StepSettings("bfloat16", fused=False), "high", claim='53.9K tokens/s; "2x speedup"'),
    Rung(
        "+ torch.compile", StepSettings("bfloat16", compile=True, fused=False), "high",
        claim='121K tokens/s; "8x speedup"',
    ),
    Rung("+ fused AdamW", StepSettings("bfloat16", compile=True), "high", claim="no figure"),
    Rung("+ padded vocabulary", StepSettings("bfloat16", compile=True), "high", padded=True, claim="no figure"),
)  # fmt: skip


@dataclass(frozen=True)
class LadderPlan:
    model: BenchModel
    shape: Shape
    warmup: int
    repeats: int
    device: str
    threads: int


def make_plan(device: str, threads: int, *, quick: bool) -> LadderPlan:
    """GPT-2 124M: the vocabulary's padding needs a large one to show anything."""
    if quick:
        return LadderPlan(TINY, Shape(2, 32), 1, 2, device, threads)
    if device == "cuda":
        return LadderPlan(GPT2, Shape(16, 1_024), 5, 20, device, threads)
    return LadderPlan(GPT2, Shape(4, 256), 1, 4, device, threads)


def run_ladder(plan: LadderPlan, folder: Path, console: Console) -> dict[str, Any]:
    """Measures and prints. A rung that fails is reported, and the next ones go on without what it added."""
    rows: list[dict[str, Any]] = []
    can_compile = True
    for rung in RUNGS:
        if rung.cuda_only and plan.device != "cuda":
            rows.append({"rung": rung.name, "claim": rung.claim, "skipped": "CUDA only"})
            continue
        row = measure_rung(rung, plan, compiled=can_compile)
        if "error" in row and rung.settings.compile and can_compile:
            can_compile = False
        console.print(f"{rung.name}: {_outcome(row)}", markup=False, highlight=False)
        rows.append(row)
    rows.append(measure_final(plan, folder))
    add_ratios(rows)
    print_ladder(console, plan, rows)
    return {"model": plan.model.name, "batch": str(plan.shape), "rungs": rows}


def measure_rung(rung: Rung, plan: LadderPlan, *, compiled: bool) -> dict[str, Any]:
    """Tokens per second of one rung; `compiled` false leaves the compiler out of it."""
    settings = rung.settings
    row: dict[str, Any] = {"rung": rung.name, "claim": rung.claim}
    if settings.compile and not compiled:
        settings = StepSettings(settings.dtype, False, settings.fused)
        row["note"] = "without the compiler"
    multiple = 128 if rung.padded else 1
    config = plan.model.config(vocab_size=-(-plan.model.vocab_size // multiple) * multiple)
    device = torch.device(plan.device)
    with ExitStack() as stack:
        stack.enter_context(float32_products(rung.products))
        stack.callback(release_memory)
        stack.callback(torch.compiler.reset)
        try:
            step = TrainingStep(config, plan.shape, settings, device, token_ids=plan.model.vocab_size)
            seconds = median_seconds(step, device, warmup=plan.warmup, repeats=plan.repeats)
        except Exception as error:  # no compiler, not enough memory: what failed is a result as well
            return row | {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    return row | {"step_ms": 1e3 * seconds, "tokens_per_second": plan.shape.tokens / seconds}


def measure_final(plan: LadderPlan, folder: Path) -> dict[str, Any]:
    """The trainer as users start it, with its defaults for this device, on a random text."""
    row: dict[str, Any] = {"rung": FINAL, "claim": ""}
    text, data = folder / "random.txt", folder / "ladder-data"
    # GPT-2's tokenizer makes more than one token of two random characters; validation is a tenth of the text.
    write_random_text(text, 40 * plan.shape.tokens)
    steps = plan.warmup + plan.repeats
    recipe = {
        "data": {"dir": str(data.absolute())},
        "model": {**plan.model.section, "vocab_multiple": plan.model.vocab_multiple, "dropout": 0.0},
        "train": {
            "batch_size": plan.shape.batch_size, "seq_len": plan.shape.seq_len, "device": plan.device,
            "max_steps": steps, "warmup_steps": 1, "log_interval": 1, "eval_interval": steps,
            "eval_tokens": plan.shape.tokens, "save_interval": steps,
        },
    }  # fmt: skip
    try:
        prepare_data(text, data, plan.model.tokenizer, plan.threads)
        figures = run_recipe(recipe, folder / "ladder-run", dropped=plan.warmup, threads=plan.threads)
    except SystemFailedError as error:
        return row | {"error": str(error)}
    seconds = median(figures.seconds)
    return row | {"step_ms": 1e3 * seconds, "tokens_per_second": plan.shape.tokens / seconds}


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """To each measured row: its speed over the first rung's and over that of the last measured rung before it.

    None where there is no such rung.
    """
    first, previous = rows[0].get("tokens_per_second"), None
    for row in rows:
        speed = row.get("tokens_per_second")
        if speed is not None:
            row["over_first"] = speed / first if first else None
            row["over_previous"] = speed / previous if previous else None
            previous = speed


def print_ladder(console: Console, plan: LadderPlan, rows: Sequence[Mapping[str, Any]]) -> None:
    title = f"Ladder, {plan.model.name}, batch {plan.shape}, {plan.device}, {plan.threads} threads"
    table = Table(title=title, title_justify="left")
    for column in ("rung", "ms/step", "tokens/s", "× float32", "× rung before", "published figure"):
        table.add_column(column, justify="left" if column in ("rung", "published figure") else "right")
    for row in rows:
        name = row["rung"] + (f" ({row['note']})" if "note" in row else "")
        if "tokens_per_second" in row:
            cells = [f"{row['step_ms']:,.1f}", f"{row['tokens_per_second']:,.0f}"]
            cells += ["–" if row[key] is None else f"{row[key]:.2f}" for key in ("over_first", "over_previous")]
        else:
            cells = ["skipped" if "skipped" in row else "FAILED", "–", "–", "–"]
        table.add_row(name, *cells, row["claim"])
    console.print(table)
    for row in rows:
        if reason := row.get("error") or row.get("skipped"):
            console.print(f"{row['rung']}: {reason}", markup=False, highlight=False)


def _outcome(row: Mapping[str, Any]) -> str:
    return f"FAILED: {row['error']}" if "error" in row else f"{row['tokens_per_second']:,.0f} tokens/s"
