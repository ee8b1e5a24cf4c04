"""What every peer's script shares: arguments, the run over batch sizes, one JSON line.

Runs in the peers' environment, which has none of this project's dependencies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

from benchmarks.workload import BatchTiming, Workload, rates, repeat_for

RunBatch = Callable[[int, int], BatchTiming]
"""(batch, seed) → timing of one batch of fresh random prompts."""


def parse_args(
    description: str,
    variants: tuple[str, ...],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="the model in this peer's own format")
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="time to spend per batch size")
    parser.add_argument("--tokens-only", action="store_true", help="print the tokens of one batch; no timing")
    if add_arguments is not None:
        add_arguments(parser)
    return parser.parse_args()


def workload_of(args: argparse.Namespace) -> Workload:
    return Workload(args.prompt_len, args.output_len, args.vocab_size)


def timing_by_difference(
    generate: Callable[[list[list[int]], int], object], prompts: list[list[int]], output_len: int
) -> BatchTiming:
    """Time a library that shows only whole generations: one token is the prefill, the rest is decoding.

    The same prompts are generated twice, with one token and with `output_len`. The library must not keep a
    prefix cache between calls.
    """
    start = perf_counter()
    generate(prompts, 1)
    prefill = perf_counter() - start
    start = perf_counter()
    generate(prompts, output_len)
    total = perf_counter() - start
    decoded = len(prompts) * (output_len - 1)
    return BatchTiming(prefill, total - prefill, decoded, len(prompts) * output_len, total)


def print_figures(name: str, package: str, args: argparse.Namespace, run_batch: RunBatch) -> None:
    """Measure every batch size and print the peer's JSON line."""
    workload = workload_of(args)
    batches: dict[str, dict[str, float]] = {}
    for batch in args.batches:
        timings = repeat_for(args.seconds, partial(run_batch, batch))
        batches[str(batch)] = rates(timings, batch, workload)
    line = {"peer": name, "variant": args.variant, "version": version(package), "threads": args.threads}
    print(json.dumps(line | {"batches": batches}))
    sys.stdout.flush()
