"""nanoGPT's side of a comparison: its train.py, from the user's own clone, run as shipped or with one line changed.

Nothing of nanoGPT is kept in this repository. Its files are copied into a temporary folder, so that the clone stays
as it is, and its output is read in the format that train.py prints:

    iter 12: loss 2.4971, time 1480.21ms, mfu 0.31%
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.systems import SystemFailedError
from benchmarks.training_command import run_command
from benchmarks.training_harness import BenchmarkError
from model.config import ModelConfig

# train.py computes in float32 whenever the device is the CPU, whatever --dtype says; this is the only line in the way.
CPU_CONTEXT = (
    "ctx = nullcontext() if device_type == 'cpu' else torch.amp.autocast(device_type=device_type, dtype=ptdtype)"
)
AUTOCAST_CONTEXT = "ctx = torch.amp.autocast(device_type=device_type, dtype=ptdtype)"
CHARACTER_DATA = Path("data/shakespeare_char")
_FILES = ("train.py", "model.py", "configurator.py")
_ITERATION = re.compile(r"^iter (\d+): loss \S+, time ([0-9.]+)ms, mfu \S+%$", re.MULTILINE)
_PARAMETERS = re.compile(r"^number of parameters: ([0-9.]+)M$", re.MULTILINE)


@dataclass(frozen=True)
class NanogptRun:
    """`seconds` per timed iteration; `parameters` in millions, as nanoGPT counts them (no position table)."""

    seconds: list[float]
    parameters: float


@dataclass(frozen=True)
class NanogptPlan:
    """What train.py is told. `compile` and `dtype` None leave its own choice for the device."""

    model: ModelConfig
    batch_size: int
    seq_len: int
    accumulation: int
    iterations: int
    dropped: int
    dropout: float
    device: str
    threads: int
    dtype: str | None = None


def replace_once(text: str, old: str, new: str, name: str) -> str:
    """`text` with its only `old` replaced. Raises BenchmarkError where it is missing or not alone."""
    if (found := text.count(old)) != 1:
        raise BenchmarkError(
            f"{name} holds the line {old!r} {found} times, not once: this version of nanoGPT needs another patch"
        )
    return text.replace(old, new)


def copy_clone(clone: Path, folder: Path) -> None:
    """train.py with its modules, and train_bf16.py, which differs in one line. Raises BenchmarkError."""
    for name in _FILES:
        if not (clone / name).is_file():
            raise BenchmarkError(f"{clone} is not a clone of nanoGPT: it has no {name}; name one with --nanogpt")
    folder.mkdir(parents=True)
    for name in _FILES:
        shutil.copyfile(clone / name, folder / name)
    source = (clone / "train.py").read_text(encoding="utf-8")
    patched = replace_once(source, CPU_CONTEXT, AUTOCAST_CONTEXT, "train.py")
    (folder / "train_bf16.py").write_text(patched, encoding="utf-8")


def prepare_characters(clone: Path, folder: Path, text: Path, threads: int) -> None:
    """nanoGPT's own character-level data of `text`, made by its own prepare.py."""
    script = clone / CHARACTER_DATA / "prepare.py"
    if not script.is_file():
        raise BenchmarkError(f"{clone} is not a clone of nanoGPT: it has no {CHARACTER_DATA}/prepare.py")
    target = folder / CHARACTER_DATA
    target.mkdir(parents=True)
    shutil.copyfile(script, target / "prepare.py")
    shutil.copyfile(text, target / "input.txt")
    run_command([sys.executable, "prepare.py"], target, threads)


def write_tokens(prepared: Path, folder: Path) -> None:
    """Our prepared GPT-2 tokens as nanoGPT's raw uint16 files; without a meta.pkl it takes GPT-2's vocabulary."""
    from training.data.dataset import open_split

    target = folder / CHARACTER_DATA
    target.mkdir(parents=True)
    for name in ("train", "val"):
        split = open_split(prepared, name)
        split.read(0, split.num_tokens).astype(np.uint16).tofile(target / f"{name}.bin")


def train_command(script: str, plan: NanogptPlan) -> list[str]:
    """As nanoGPT's README says for the device; only sizes, lengths and intervals are given."""
    model = plan.model
    options: dict[str, object] = {
        "dataset": CHARACTER_DATA.name, "device": plan.device,
        "n_layer": model.num_layers, "n_head": model.num_heads, "n_embd": model.hidden_size,
        "block_size": plan.seq_len, "dropout": plan.dropout,
        "batch_size": plan.batch_size, "gradient_accumulation_steps": plan.accumulation,
        "max_iters": plan.iterations - 1, "lr_decay_iters": plan.iterations, "warmup_iters": 2,
        # The first iteration always evaluates; it is dropped, and no other does.
        "eval_interval": 10 * plan.iterations, "eval_iters": 1, "log_interval": 1,
    }  # fmt: skip
    if plan.device == "cpu":
        options["compile"] = False
    if plan.dtype is not None:
        options["dtype"] = plan.dtype
    return [sys.executable, script, *(f"--{key}={value}" for key, value in options.items())]


def run_nanogpt(folder: Path, script: str, plan: NanogptPlan) -> NanogptRun:
    """One run of `script` in `folder`. Raises SystemFailedError."""
    return parse_output(run_command(train_command(script, plan), folder, plan.threads), dropped=plan.dropped)


def parse_output(output: str, *, dropped: int) -> NanogptRun:
    """What train.py printed, without its first `dropped` iterations. Raises SystemFailedError for another format."""
    times = {int(number): float(milliseconds) for number, milliseconds in _ITERATION.findall(output)}
    timed = [milliseconds / 1e3 for number, milliseconds in sorted(times.items()) if number >= dropped]
    parameters = _PARAMETERS.search(output)
    if not timed or parameters is None:
        raise SystemFailedError(f"train.py printed no iteration after the first {dropped}: …{output[-300:].strip()}")
    return NanogptRun(timed, float(parameters[1]))
