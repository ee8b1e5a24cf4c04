"""Training measured: beside nanoGPT, rung by rung, and what memory, batch and length cost.

    python -m benchmarks.training all --nanogpt DIR         (or `make bench-training NANOGPT=DIR`)

    compare        side by side with nanoGPT's train.py, from your own clone
    ladder         float32, TF32, bf16, compile, fused AdamW, padded vocabulary, and the trainer itself
    checkpointing  activation checkpointing: memory against time
    grid           batch x length, forward and training step, 32-bit and 16-bit
    scaling        a toy fit of loss against size (in `all` only with --scaling)

Prints tables and writes one JSON file. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import training_compare, training_grid, training_ladder, training_memory, training_scaling
from benchmarks.machine import available_cores, describe_commit, describe_machine, describe_versions
from benchmarks.systems import ROOT, SystemFailedError
from benchmarks.training_harness import BenchmarkError
from model.errors import QuillError

MODES = ("compare", "ladder", "checkpointing", "grid", "scaling")
Measure = Callable[[], dict[str, Any]]


def run(args: argparse.Namespace, console: Console) -> int:
    """Runs the modes asked for, one after another; one that fails does not hide the others. 1 if any failed."""
    machine = describe_machine()
    torch.set_num_threads(args.threads)
    started = datetime.now(UTC)
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        for mode, measure in chosen_modes(args, Path(folder), console).items():
            console.rule(mode, align="left")
            try:
                results[mode] = measure()
            except (BenchmarkError, SystemFailedError, QuillError) as error:
                failures[mode] = str(error)
                console.print(f"{mode} FAILED: {error}", markup=False, style="red")
    failures |= nested_failures(results)
    result = {
        "date": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.training", *args.command]),
        **describe_commit(ROOT),
        "machine": machine,
        "versions": describe_versions(),
        "device": describe_device(args.device),
        "threads": args.threads,
        "quick": args.quick,
        "modes": results,
        "failures": failures,
    }
    out: Path = args.out or ROOT / "benchmarks" / "results" / f"{started:%Y-%m-%d-%H%M}-training.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {os.path.relpath(out)}", markup=False)
    return 1 if failures else 0


def chosen_modes(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Measure]:
    """What `mode` stands for, in order. `all` leaves out what it was given no input for, and says so."""
    known: dict[str, Measure] = {
        "compare": partial(_compare, args, folder, console),
        "ladder": partial(_ladder, args, folder, console),
        "checkpointing": partial(_checkpointing, args, console),
        "grid": partial(_grid, args, console),
        "scaling": partial(_scaling, args, folder, console),
    }
    if args.mode != "all":
        return {args.mode: known[args.mode]}
    if args.nanogpt is None:
        known.pop("compare")
        console.print("no --nanogpt DIR: the comparison with nanoGPT is left out")
    if not args.scaling:
        known.pop("scaling")
    return known


def _compare(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    if args.nanogpt is None:
        raise BenchmarkError("name your clone of nanoGPT with --nanogpt DIR (github.com/karpathy/nanoGPT)")
    plan = training_compare.make_plan(
        args.device,
        args.threads,
        quick=args.quick,
        rounds=args.rounds,
        steps=args.steps,
        overrides=tuple(args.override),
    )
    text = args.text or training_compare.default_text(args.nanogpt)
    return training_compare.run_compare(plan, args.nanogpt.absolute(), text, folder, console)


def _ladder(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    plan = training_ladder.make_plan(args.device, args.threads, quick=args.quick)
    return training_ladder.run_ladder(plan, folder, console)


def _checkpointing(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    plan = training_memory.make_plan(args.device, args.threads, quick=args.quick)
    return training_memory.run_checkpointing(plan, console)


def _grid(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    plan = training_grid.make_plan(args.device, quick=args.quick, preset=args.preset, folder=args.model)
    return training_grid.run_grid(plan, console)


def _scaling(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    if args.text is None and args.nanogpt is None:
        raise BenchmarkError("name a text of a megabyte or so with --text FILE")
    text = args.text or training_compare.default_text(args.nanogpt)
    plan = training_scaling.make_plan(args.device, args.threads, quick=args.quick)
    return training_scaling.run_scaling(plan, text, folder, console)


def nested_failures(results: dict[str, Any]) -> dict[str, str]:
    """Systems and rungs that failed inside a mode that went on without them."""
    found = {
        f"compare/dropout {row['dropout']:g}/{name}": reason
        for row in results.get("compare", {}).get("rows", ())
        for name, reason in row["failures"].items()
    }
    rungs = results.get("ladder", {}).get("rungs", ())
    return found | {f"ladder/{row['rung']}": row["error"] for row in rungs if "error" in row}


def describe_device(device: str) -> dict[str, Any]:
    """The card by name; a CPU is described under `machine`."""
    if device != "cuda":
        return {"type": device}
    properties = torch.cuda.get_device_properties(0)
    return {"type": device, "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("all", *MODES))
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="your clone of nanoGPT")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text to train on; default: the clone's tinyshakespeare"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=3, help="compare: runs of each system")
    parser.add_argument("--steps", type=int, default=12, help="compare: timed steps of each run")
    parser.add_argument(
        "--override", action="append", default=[], metavar="SECTION.KEY=VALUE", help="compare: passed on to our trainer"
    )
    parser.add_argument("--preset", help="grid: a model of model.presets; default: GPT-2 124M, on a CPU 10.65M")
    parser.add_argument("--model", type=Path, metavar="DIR", help="grid: a checkpoint in place of a preset")
    parser.add_argument("--scaling", action="store_true", help="all: the toy scaling fit too, two or three minutes")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models and few steps: shows that it works, no figures"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/DATE-training.json")
    args = parser.parse_args(argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    if min(args.rounds, args.steps, args.threads) < 1:
        parser.error("--rounds, --steps and --threads must be at least 1")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text {args.text}: no such file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run(args, Console(width=None if sys.stdout.isatty() else 150))


if __name__ == "__main__":
    sys.exit(main())
