"""Activation checkpointing: what it saves in memory and costs in time, beside a published claim about it.

    python -m benchmarks.training_memory '{"model": "tiny", …}'      one variant, one JSON line (used by the table)

Each variant is a process of its own, so that one's memory is not hidden in what another has left behind. Two figures
say what is kept: the bytes that autograd holds between forward and backward, counted exactly through
torch.autograd.graph.saved_tensors_hooks, and the peak of a whole step, from the operating system or the CUDA allocator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.systems import ROOT
from benchmarks.training_command import run_command
from benchmarks.training_harness import Dtype, Shape, StepSettings, TrainingStep, median_seconds, synchronize
from benchmarks.training_models import GPT2, SHAKESPEARE_CHAR, TINY, BenchModel

MODELS = {"gpt2": GPT2, "shakespeare-char": SHAKESPEARE_CHAR, "tiny": TINY}
CLAIM = '"~30% slower but 40% memory reduction" (S2)'
MIB = float(1 << 20)


@dataclass(frozen=True)
class MemoryPlan:
    model: str
    shape: Shape
    dtypes: tuple[Dtype, ...]
    warmup: int
    repeats: int
    device: str
    threads: int


def make_plan(device: str, threads: int, *, quick: bool) -> MemoryPlan:
    if quick:
        return MemoryPlan("tiny", Shape(4, 64), ("float32",), 1, 2, device, threads)
    if device == "cuda":
        return MemoryPlan("gpt2", Shape(16, 1_024), ("float32", "bfloat16"), 3, 10, device, threads)
    # A CPU takes many minutes over GPT-2; what is kept for the backward pass scales with the model.
    return MemoryPlan("shakespeare-char", Shape(16, 256), ("float32", "bfloat16"), 1, 5, device, threads)


def run_checkpointing(plan: MemoryPlan, console: Console) -> dict[str, Any]:
    rows = []
    for dtype in plan.dtypes:
        plain, recomputed = (_measure_apart(plan, dtype, recompute) for recompute in (False, True))
        rows.append({"dtype": dtype, "plain": plain, "checkpointing": recomputed, **trade(plain, recomputed)})
    print_trade(console, plan, rows)
    return {"model": MODELS[plan.model].name, "batch": str(plan.shape), "claim": CLAIM, "rows": rows}


def trade(plain: Mapping[str, Any], recomputed: Mapping[str, Any]) -> dict[str, float | None]:
    """How much slower, and by which share the bytes kept and the step's peak shrink."""
    peaks = plain["peak_bytes"], recomputed["peak_bytes"]
    return {
        "slower": recomputed["step_ms"] / plain["step_ms"] - 1.0,
        "kept_reduction": 1.0 - recomputed["kept_bytes"] / plain["kept_bytes"],
        "peak_reduction": None if None in peaks else 1.0 - peaks[1] / peaks[0],
    }


def _measure_apart(plan: MemoryPlan, dtype: Dtype, recompute: bool) -> dict[str, Any]:
    """`measure` in a fresh process. Raises SystemFailedError."""
    request = {
        "model": plan.model, "batch_size": plan.shape.batch_size, "seq_len": plan.shape.seq_len, "dtype": dtype,
        "recompute": recompute, "warmup": plan.warmup, "repeats": plan.repeats, "device": plan.device,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.training_memory", json.dumps(request)]
    found: dict[str, Any] = json.loads(run_command(command, ROOT, plan.threads).splitlines()[-1])
    return found


def measure(
    model: BenchModel, shape: Shape, settings: StepSettings, device: torch.device, warmup: int, repeats: int
) -> dict[str, Any]:
    """Milliseconds of a step, bytes kept for the backward pass, peak bytes of a step (None where nobody tells)."""
    step = TrainingStep(model.config(), shape, settings, device)
    step()  # makes gradients and moments, which are no activations
    peak_bytes = peak_memory(step, device)
    seconds = median_seconds(step, device, warmup=warmup, repeats=repeats)
    return {"step_ms": 1e3 * seconds, "kept_bytes": kept_bytes(step.model, step.loss), "peak_bytes": peak_bytes}


def kept_bytes(model: torch.nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps from the forward pass of `loss` for its backward pass; the parameters do not count.

    Tensors that share storage count once. A checkpointed layer keeps its input, which is seen here as well; what it
    computes anew in the backward pass is not kept and not counted.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Peak bytes while `step` runs: CUDA's allocator, or the process's resident memory where Linux can reset it."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of resident memory, VmHWM
        step()
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        step()
        return None
    values = dict(line.split(":", 1) for line in status.splitlines())
    return int(values["VmHWM"].split()[0]) << 10


def print_trade(console: Console, plan: MemoryPlan, rows: Sequence[Mapping[str, Any]]) -> None:
    title = f"Activation checkpointing, {MODELS[plan.model].name}, batch {plan.shape}, {plan.device}"
    table = Table(title=title, title_justify="left")
    for column in ("", "ms/step", "kept for backward, MiB", "peak of a step, MiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        for name in ("plain", "checkpointing"):
            found = row[name]
            peak = "–" if found["peak_bytes"] is None else f"{found['peak_bytes'] / MIB:,.0f}"
            kept = f"{found['kept_bytes'] / MIB:,.1f}"
            table.add_row(f"{row['dtype']}, {name}", f"{found['step_ms']:,.1f}", kept, peak)
        peak = "–" if row["peak_reduction"] is None else f"{-row['peak_reduction']:+.0%}"
        table.add_row(f"{row['dtype']}, trade", f"{row['slower']:+.0%}", f"{-row['kept_reduction']:+.0%}", peak)
    console.print(table)
    console.print(f"Published elsewhere: {CLAIM}", markup=False, highlight=False)


def main(argv: Sequence[str]) -> int:
    request = json.loads(argv[0])
    settings = StepSettings(request["dtype"], recompute=request["recompute"])
    run = partial(measure, warmup=request["warmup"], repeats=request["repeats"])
    shape = Shape(request["batch_size"], request["seq_len"])
    print(json.dumps(run(MODELS[request["model"]], shape, settings, torch.device(request["device"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
