"""Quill's side of a comparison: the public command line, run as users run it, and the figures it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.systems import ROOT, SystemFailedError

TIMEOUT_SECONDS = 1_800


@dataclass(frozen=True)
class RunFigures:
    """`seconds` per timed step; `val_loss` of the last validation, nats per token."""

    seconds: list[float]
    val_loss: float


def run_command(command: Sequence[str], cwd: Path, threads: int) -> str:
    """Standard output of a command that may use `threads` cores. Raises SystemFailedError with its last words."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    try:
        result = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemFailedError(str(error)) from error
    if result.returncode != 0:
        raise SystemFailedError(f"exit code {result.returncode}: {result.stderr[-1_500:].strip()}")
    return result.stdout


def prepare_data(text: Path, out: Path, tokenizer: str, threads: int) -> dict[str, Any]:
    """`python -m training prepare`; returns what it reports of itself."""
    command = [
        sys.executable, "-m", "training", "prepare", "--input", str(text.absolute()), "--out", str(out.absolute()),
        "--tokenizer", tokenizer, "--json",
    ]  # fmt: skip
    report: dict[str, Any] = json.loads(run_command(command, ROOT, threads).splitlines()[-1])
    return report


def run_recipe(
    tree: Mapping[str, Any], folder: Path, *, dropped: int, threads: int, overrides: Sequence[str] = ()
) -> RunFigures:
    """`python -m training train` of the recipe `tree`, in `folder`, which must be new.

    The first `dropped` steps are not timed; `overrides` are words of the command line, such as train.dtype=float32.
    """
    folder.mkdir(parents=True)
    recipe, run_dir = folder / "recipe.toml", folder / "run"
    recipe.write_text(tomli_w.dumps(dict(tree) | {"run": {"dir": str(run_dir.absolute())}}), encoding="utf-8")
    command = [sys.executable, "-m", "training", "train", str(recipe.absolute()), *overrides, "--resume", "never"]
    run_command(command, ROOT, threads)
    return read_metrics(run_dir / "metrics.jsonl", dropped=dropped)


def read_metrics(path: Path, *, dropped: int) -> RunFigures:
    """From a run's metrics.jsonl: the time of each logged step after the first `dropped` ones.

    `tokens_per_second` of a line covers the steps since the line before; `tokens` counts from the start of the run.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["split"] == "train" and line["step"] > dropped]
    losses = [line["loss"] for line in lines if line["split"] == "val"]
    timed = [line["tokens"] / line["step"] / line["tokens_per_second"] for line in steps if line["tokens_per_second"]]
    if not timed or not losses:
        raise SystemFailedError(f"{path.name} has no training step after the first {dropped}, or no validation")
    return RunFigures(timed, losses[-1])
