"""CUDA in one go: is what runs on the card right, how fast is it, and which of the project's goals does it meet?

    python -m benchmarks.gpu            (or `make bench-gpu`)

Needs a CUDA device and ten minutes at most: `--total-seconds` bounds the run, and what no longer fits is skipped, the
most important parts coming first. Each part is a process of its own; one that fails is reported in its place. Writes
one JSON file, anew after every part, and prints a table of the goals; the last line of the output is one JSON object.
The exit status is 1 if something failed (a goal that is missed is no failure), 2 without a device. `--quick` runs the
same on the CPU with tiny models: figures that say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_device import driver_version
from benchmarks.gpu_engine import TINY
from benchmarks.gpu_goals import Results, Row, goal_rows
from benchmarks.gpu_job import Job
from benchmarks.gpu_process import ROOT, Part, run_part
from benchmarks.machine import describe_commit, describe_machine, describe_versions
from benchmarks.make_model import make_model

CACHE = ROOT / "benchmarks" / ".cache"
# In the order of importance, with the seconds that each may take at most; together they take less than that.
PARTS = (
    Part("correct", 120),
    Part("device", 40),
    Part("engine", 80),
    Part("http", 80),
    Part("large", 90),
    Part("transformers", 130),
    Part("no overlap", 45),
    Part("no graphs", 45),
    Part("deterministic", 60),
    Part("sampling", 40),
    Part("host", 40),
    Part("attention", 60),
    Part("varlen", 45),
    Part("backends", 100),
)


def make_job(args: argparse.Namespace) -> Job:
    """Makes the model that the parts share, unless it is there."""
    name = "gpt2-random-quick" if args.quick else "gpt2-random"
    model: Path = args.model or CACHE / name
    if not (model / "config.json").exists():
        make_model("gpt2", model, **(TINY if args.quick else {}))
    large: Path = args.large_model or CACHE / ("gpt2-xl-random-quick" if args.quick else "gpt2-xl-random")
    job = Job(model=str(model.resolve()), large_model=str(large.resolve()), seconds=args.seconds)
    return tiny_job(job) if args.quick else job


def tiny_job(job: Job) -> Job:
    return dataclasses.replace(
        job, large_preset="gpt2", device="cpu", dtype="float32", streams=(1, 4), prompt_len=12, output_len=8,
        compared=3, compared_tokens=6, kv_cache_memory=2**25, seconds=0.0, tiny=True,
    )  # fmt: skip


def run(job: Job, parts: Sequence[Part], total_seconds: float, save: Callable[[Results], None]) -> Results:
    """Each part in turn, as long as the time lasts; `save` gets the results after each."""
    deadline = perf_counter() + total_seconds
    results: Results = {}
    for part in parts:
        results[part.name] = run_part(part, job, deadline - perf_counter())
        print_part(part.name, results[part.name])
        save(results)
    return results


def print_part(name: str, result: dict[str, Any]) -> None:
    print(f"{name} ({result.get('seconds', 0)} s)")
    for figure, value in result["figures"].items():
        print(f"  {figure}: {', '.join(f'{key} {each}' for key, each in value.items())}")
    for key in ("skipped", "error"):
        if key in result:
            print(f"  {key}: {result[key]}")
    sys.stdout.flush()


def print_goals(console: Console, rows: Sequence[Row]) -> None:
    table = Table(title="Goals", title_justify="left")
    for column in ("", "measured", "goal", "unit", "verdict"):
        table.add_column(column, justify="right" if column in ("measured", "goal") else "left")
    for row in rows:
        measured, least = (
            "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
            for value in (row.measured, row.least)
        )
        table.add_row(row.name, measured, least, row.unit, row.verdict)
    console.print(table)


def count_failures(results: Results) -> int:
    """Parts and figures with an error."""
    entries = [*results.values(), *(value for result in results.values() for value in result["figures"].values())]
    return sum("error" in entry for entry in entries)


def describe_run(job: Job, started: datetime) -> dict[str, Any]:
    return {
        "date": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        **describe_commit(ROOT),
        "card": torch.cuda.get_device_name() if job.device == "cuda" else None,
        "driver": driver_version(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "job": dataclasses.asdict(job) | {name: Path(getattr(job, name)).name for name in ("model", "large_model")},
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--total-seconds", type=float, default=540.0, help="time for all parts together")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each figure of the engine")
    parser.add_argument("--model", type=Path, help="a GPT-2 124M folder; default: random weights, made once")
    parser.add_argument("--large-model", type=Path, help="a GPT-2 XL folder; default: random weights, made once")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/DATE-gpu.json")
    parser.add_argument("--quick", action="store_true", help="does it all run? tiny models on the CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.quick and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    started = datetime.now(UTC)
    out: Path = args.out or ROOT / "benchmarks" / "results" / f"{started:%Y-%m-%d-%H%M}-gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    begun = perf_counter()
    job = make_job(args)
    description = describe_run(job, started)

    def save(results: Results) -> None:
        goals = [row.as_dict() for row in goal_rows(results, job)]
        out.write_text(json.dumps({**description, "goals": goals, "parts": results}, indent=1) + "\n")

    parts = [part for part in PARTS if part.name in args.parts]
    results = run(job, parts, args.total_seconds - (perf_counter() - begun), save)
    rows = goal_rows(results, job)
    print_goals(Console(width=None if sys.stdout.isatty() else 150), rows)
    failed = count_failures(results)
    print(json.dumps({"failed": failed, "out": str(out), "goals": {row.name: row.measured for row in rows}}))
    return 1 if failed else 0


if __name__ == "__main__":
    # A part is in a session of its own, and would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
