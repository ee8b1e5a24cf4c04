"""Quill's trainer beside nanoGPT's in one run: same model, same text, same batch, same threads, in turn.

Each round runs every system once, in turning order, each as a process of its own through its own command line.
Beside the ratios stand the limits: what the machine's matrix products allow in float32 and in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compare import measure
from benchmarks.summary import median
from benchmarks.systems import Figures, System
from benchmarks.training_command import prepare_data, run_recipe
from benchmarks.training_harness import BenchmarkError, Shape, matmul_peak
from benchmarks.training_models import GPT2, SHAKESPEARE_CHAR, TINY, BenchModel
from benchmarks.training_nanogpt import (
    CHARACTER_DATA,
    NanogptPlan,
    copy_clone,
    prepare_characters,
    run_nanogpt,
    write_tokens,
)
from model.transformer import Transformer
from training.metrics import flops_per_token, peak_flops

OURS, SHIPPED, BF16 = "Quill", "nanoGPT as shipped", "nanoGPT + bf16 autocast"
GOALS = {"cpu": {SHIPPED: 3.0, BF16: 1.3}, "cuda": {SHIPPED: 1.3}}
MFU_GOAL = 0.45


@dataclass(frozen=True)
class ComparePlan:
    """`steps` per run, of which the first `dropped` are not timed; `overrides` go to our command as they are."""

    model: BenchModel
    shape: Shape
    accumulation: int
    dropouts: tuple[float, ...]
    rounds: int
    steps: int
    dropped: int
    device: str
    threads: int
    overrides: tuple[str, ...]

    @property
    def tokens_per_step(self) -> int:
        return self.shape.tokens * self.accumulation


@dataclass(frozen=True)
class Limits:
    """FLOP/s of this machine's fastest matrix product by type, FLOPs, and the data sheet's rate.

    `flops_per_token` and `flops_per_step` are the usual count, which takes attention over the whole context;
    `least_flops_per_step` takes it over the past alone, which is all that a causal model has to compute.
    """

    matmul: dict[str, float]
    flops_per_token: float
    flops_per_step: float
    least_flops_per_step: float
    data_sheet: float | None

    def step_seconds(self, dtype: str) -> float:
        """What a step costs at least, if every product ran at the peak and nothing else took time."""
        return self.least_flops_per_step / self.matmul[dtype]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"step_seconds": {name: self.step_seconds(name) for name in self.matmul}}


@dataclass(frozen=True)
class Comparison:
    """`value` = ours ÷ theirs in tokens per second. `limit` is the value at which ours would run at the GEMM peak."""

    name: str
    value: float
    goal: float | None
    limit: float

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.value >= self.goal

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def make_plan(
    device: str, threads: int, *, quick: bool, rounds: int, steps: int, overrides: tuple[str, ...]
) -> ComparePlan:
    """The issue's workloads: 10.65M on a CPU, GPT-2 124M at 1,024 tokens on CUDA."""
    if quick:
        return ComparePlan(TINY, Shape(2, 32), 1, (0.0,), 1, 6, 2, device, threads, overrides)
    if device == "cuda":
        return ComparePlan(GPT2, Shape(32, 1_024), 16, (0.0,), rounds, steps + 6, 6, device, threads, overrides)
    return ComparePlan(
        SHAKESPEARE_CHAR, Shape(16, 256), 1, (0.0, 0.2), rounds, steps + 4, 4, device, threads, overrides
    )


def run_compare(plan: ComparePlan, nanogpt: Path, text: Path, folder: Path, console: Console) -> dict[str, Any]:
    """Measures and prints; returns what the result file keeps. Raises BenchmarkError for what cannot be used."""
    clone, data = folder / "nanogpt", folder / "data"
    copy_clone(nanogpt, clone)
    prepared = prepare_data(text, data, plan.model.tokenizer, plan.threads)
    if plan.model.tokenizer == "char":
        prepare_characters(nanogpt, clone, text, plan.threads)
    else:
        write_tokens(data, clone)
    limits = measure_limits(plan, prepared["vocab_size"])
    rows = [_run_row(plan, dropout, clone, data, folder, limits, console) for dropout in plan.dropouts]
    print_limits(console, plan, limits, [row["medians"] for row in rows])
    return {
        "model": plan.model.name,
        "batch": f"{plan.shape} x {plan.accumulation}",
        "tokens_per_step": plan.tokens_per_step,
        "steps": plan.steps,
        "dropped": plan.dropped,
        "vocab_size": prepared["vocab_size"],
        "overrides": plan.overrides,
        "limits": limits.as_dict(),
        "rows": rows,
    }


def _run_row(
    plan: ComparePlan, dropout: float, clone: Path, data: Path, folder: Path, limits: Limits, console: Console
) -> dict[str, Any]:
    console.print(f"{plan.model.name}, batch {plan.shape} x {plan.accumulation}, dropout {dropout:g}")
    systems = [
        _our_system(plan, dropout, data, folder / f"runs-{dropout:g}"),
        *_nanogpt_systems(plan, dropout, clone),
    ]
    rounds, failures = measure(systems, plan.rounds, console)
    medians = summarise(rounds, plan.tokens_per_step)
    found = compare(plan.device, medians, limits)
    print_row(console, plan, dropout, medians, limits)
    print_ratios(console, found)
    return {
        "dropout": dropout,
        "medians": medians,
        "ratios": [item.as_dict() for item in found],
        "rounds": rounds,
        "systems": {system.name: system.details for system in systems},
        "failures": failures,
    }


def our_recipe(plan: ComparePlan, dropout: float, data: Path) -> dict[str, Any]:
    """What a user would write for this workload; precision, compile and all else are the recipe's defaults."""
    return {
        "data": {"dir": str(data.absolute())},
        "model": {**plan.model.section, "vocab_multiple": plan.model.vocab_multiple, "dropout": dropout},
        "train": {
            "batch_size": plan.shape.batch_size, "seq_len": plan.shape.seq_len, "grad_accum_steps": plan.accumulation,
            "max_steps": plan.steps, "warmup_steps": 2, "device": plan.device, "log_interval": 1,
            "eval_interval": plan.steps, "eval_tokens": plan.shape.tokens, "save_interval": plan.steps,
        },
    }  # fmt: skip


def _our_system(plan: ComparePlan, dropout: float, data: Path, folder: Path) -> System:
    details: dict[str, Any] = {"recipe": our_recipe(plan, dropout, data)}
    details["recipe"].pop("data")

    def run(number: int) -> Figures:
        recipe = our_recipe(plan, dropout, data)
        found = run_recipe(
            recipe, folder / str(number), dropped=plan.dropped, threads=plan.threads, overrides=plan.overrides
        )
        return _figures(found.seconds)

    return System(OURS, "ours", run, details)


def _nanogpt_systems(plan: ComparePlan, dropout: float, clone: Path) -> list[System]:
    variants: list[tuple[str, str, str | None]] = [(SHIPPED, "train.py", None)]
    if plan.device == "cpu":  # on CUDA it is in bfloat16 as shipped
        variants.append((BF16, "train_bf16.py", "bfloat16"))
    return [_nanogpt_system(plan, dropout, clone, *variant) for variant in variants]


def _nanogpt_system(
    plan: ComparePlan, dropout: float, clone: Path, name: str, script: str, dtype: str | None
) -> System:
    details: dict[str, Any] = {"script": script, "dtype": dtype}
    their_plan = NanogptPlan(
        plan.model.config(), plan.shape.batch_size, plan.shape.seq_len, plan.accumulation, plan.steps, plan.dropped,
        dropout, plan.device, plan.threads, dtype,
    )  # fmt: skip

    def run(_: int) -> Figures:
        found = run_nanogpt(clone, script, their_plan)
        details["parameters_in_millions"] = found.parameters
        return _figures(found.seconds)

    return System(name, "peer", run, details)


def _figures(seconds: Sequence[float]) -> Figures:
    return {"step_ms": 1e3 * median(seconds), "step_ms_min": 1e3 * min(seconds)}


def summarise(rounds: Mapping[str, Sequence[Figures]], tokens_per_step: int) -> dict[str, Figures]:
    """By system: the median over rounds of a run's median step, the fastest step of all, and tokens per second."""
    medians = {}
    for name, runs in rounds.items():
        step_ms = median([run["step_ms"] for run in runs])
        medians[name] = {
            "step_ms": step_ms,
            "step_ms_min": min(run["step_ms_min"] for run in runs),
            "tokens_per_second": 1e3 * tokens_per_step / step_ms,
        }
    return medians


def compare(device: str, medians: Mapping[str, Figures], limits: Limits) -> list[Comparison]:
    """Ours over each of theirs, by the medians; on CUDA our model FLOPs utilisation as well."""
    if OURS not in medians:
        return []
    ours, at_peak = medians[OURS], 1e3 * limits.step_seconds("bfloat16")
    found = [
        Comparison(
            f"{OURS} ÷ {name}",
            theirs["step_ms"] / ours["step_ms"],
            GOALS[device].get(name),
            theirs["step_ms"] / at_peak,
        )
        for name, theirs in medians.items()
        if name != OURS
    ]
    if limits.data_sheet is not None and device == "cuda":
        mfu = ours["tokens_per_second"] * limits.flops_per_token / limits.data_sheet
        found.append(Comparison("MFU", mfu, MFU_GOAL, limits.matmul["bfloat16"] / limits.data_sheet))
    return found


def measure_limits(plan: ComparePlan, vocab_size: int) -> Limits:
    device = torch.device(plan.device)
    config = plan.model.config(vocab_size=vocab_size)
    with torch.device("meta"):
        model = Transformer(config)
    per_token = flops_per_token(model, config, plan.shape.seq_len)
    future = 6.0 * config.num_layers * config.q_size * (plan.shape.seq_len - 1)
    sizes = (256,) if plan.model is TINY else (4_096, 8_192) if plan.device == "cuda" else (1_024, 2_048)
    return Limits(
        matmul={
            name: max(matmul_peak(device, dtype, size) for size in sizes)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        flops_per_token=per_token,
        flops_per_step=per_token * plan.tokens_per_step,
        least_flops_per_step=(per_token - future) * plan.tokens_per_step,
        data_sheet=peak_flops(device, torch.bfloat16) if plan.device == "cuda" else None,
    )


def print_row(
    console: Console, plan: ComparePlan, dropout: float, medians: Mapping[str, Figures], limits: Limits
) -> None:
    title = f"{plan.model.name}, batch {plan.shape} x {plan.accumulation}, dropout {dropout:g}, {plan.threads} threads"
    table = Table(title=title, title_justify="left")
    columns = ("system", "ms/step median", "min", "tokens/s", "GFLOP/s", "of the bf16 product's peak")
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, row in medians.items():
        rate = limits.flops_per_step / row["step_ms"] * 1e3
        table.add_row(
            name, f"{row['step_ms']:,.1f}", f"{row['step_ms_min']:,.1f}", f"{row['tokens_per_second']:,.0f}",
            f"{rate / 1e9:,.0f}", f"{rate / limits.matmul['bfloat16']:.0%}",
        )  # fmt: skip
    console.print(table)


def print_ratios(console: Console, found: Sequence[Comparison]) -> None:
    for item in found:
        goal = "" if item.goal is None else f", goal {item.goal:.2f} {'met' if item.met else 'MISSED'}"
        console.print(
            f"{item.name}: {item.value:.2f}{goal} (at the bf16 product's peak: {item.limit:.2f})", markup=False
        )


def print_limits(console: Console, plan: ComparePlan, limits: Limits, rows: Sequence[Mapping[str, Figures]]) -> None:
    """What is attainable here, in words: a reader shall see whether a goal is within the machine's reach."""
    float32, bfloat16 = limits.matmul["float32"], limits.matmul["bfloat16"]
    console.print(
        f"Limits of this machine: products {float32 / 1e9:,.0f} GFLOP/s in float32, {bfloat16 / 1e9:,.0f} in bfloat16 "
        f"({bfloat16 / float32:.1f} times as fast). A step is at least {limits.least_flops_per_step / 1e12:.2f} TFLOP: "
        f"{1e3 * limits.step_seconds('float32'):,.0f} and {1e3 * limits.step_seconds('bfloat16'):,.0f} ms at these "
        "peaks, with no time for anything but products.",
        highlight=False,
    )
    goal, dtype = GOALS[plan.device][SHIPPED], "float32" if plan.device == "cpu" else "bfloat16"
    for medians in rows[:1]:
        if SHIPPED in medians:
            seconds = medians[SHIPPED]["step_ms"] / 1e3
            limit, share = seconds / limits.step_seconds("bfloat16"), limits.step_seconds(dtype) / seconds
            reach = "within" if limit >= goal else "OUT OF"
            console.print(
                f"{SHIPPED} runs at {share:.0%} of the {dtype} product's peak, so no bf16 trainer here can be more "
                f"than {limit:.2f} times as fast: a ratio of {goal:.1f} is {reach} reach.",
                highlight=False,
            )


def default_text(nanogpt: Path) -> Path:
    """The clone's tinyshakespeare, if its owner has prepared it. Raises BenchmarkError."""
    text = nanogpt / CHARACTER_DATA / "input.txt"
    if not text.is_file():
        raise BenchmarkError(f"{text} does not exist; run nanoGPT's prepare.py there, or name a text with --text")
    return text
