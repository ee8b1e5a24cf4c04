"""The engine alone, in this process: no HTTP, no process boundary, no text.

    python -m benchmarks.offline --model DIR --batches 1 8 32 64

Per number of streams: prefill (until each stream has its first token, with one token asked for), decoding only
(steps in which every stream decodes), and output end to end, prefill included. Tokens per second, greedy, each
run with fresh random prompts. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from time import monotonic, perf_counter
from typing import Any

from benchmarks.workload import EXIT_REFUSED, BatchTiming, Workload, random_prompts, rates, repeat_for
from model.errors import ConfigError, QuillError
from model.sampling_params import SamplingParams
from server.engine.config import EngineConfig
from server.engine.environment import engine_environment
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest

GREEDY = SamplingParams(temperature=0.0)


class BenchmarkError(Exception):
    """The engine cannot run, or did not run, the workload as asked."""


class OfflineBenchmark:
    """Batches of requests of one length through one engine, sampled as `params` says.

    Raises BenchmarkError if a batch cannot fit at once.
    """

    def __init__(
        self, engine: LLMEngine, workload: Workload, largest_batch: int, params: SamplingParams = GREEDY
    ) -> None:
        info = engine.info
        if info.max_num_seqs < largest_batch:
            raise BenchmarkError(f"the engine runs {info.max_num_seqs} sequences at once: raise --max-num-seqs")
        room = info.num_blocks * info.block_size
        needed = largest_batch * (workload.prompt_len + workload.output_len)
        if room < needed:
            raise BenchmarkError(f"the KV cache holds {room} tokens, not {needed}: raise --kv-cache-memory")
        self._engine = engine
        self._workload = workload
        self._params = dataclasses.replace(params, ignore_eos=True)
        self._next_id = 0

    def run_batch(self, batch: int, seed: int) -> BatchTiming:
        """Time the prefill with one-token requests, then the whole workload with other prompts."""
        prompts = random_prompts(self._workload, 2 * batch, seed=1_000 * batch + seed)
        prefill_seconds, _ = self._run(prompts[:batch], 1)
        total_seconds, marks = self._run(prompts[batch:], self._workload.output_len)
        decode_tokens, decode_seconds = all_decoding(marks, batch)
        return BatchTiming(
            prefill_seconds, decode_seconds, decode_tokens, batch * self._workload.output_len, total_seconds
        )

    def _run(self, prompts: list[list[int]], output_len: int) -> tuple[float, list[StepMark]]:
        """Seconds from the first `add` to the last token, and a mark per step."""
        params = dataclasses.replace(self._params, max_tokens=output_len)
        preempted = self._engine.stats().num_preemptions
        start = perf_counter()
        for prompt in prompts:
            self._engine.add(AddRequest(self._next_id, prompt, params, monotonic()))
            self._next_id += 1
        marks: list[StepMark] = []
        started = finished = tokens = 0
        seen: set[int] = set()
        while self._engine.has_unfinished:
            outputs = self._engine.step().outputs
            for output in outputs:
                tokens += len(output.token_ids)
                seen.add(output.request_id)
                finished += output.finish_reason is not None
            started = len(seen)
            marks.append(StepMark(perf_counter(), started, finished, tokens))
        if tokens != len(prompts) * output_len:
            raise BenchmarkError(f"the engine generated {tokens} tokens, not {len(prompts) * output_len}")
        if self._engine.stats().num_preemptions != preempted:
            raise BenchmarkError("the engine preempted sequences: raise --kv-cache-memory")
        return marks[-1].at - start, marks


@dataclasses.dataclass(frozen=True, slots=True)
class StepMark:
    """After a step: the time, and how many streams have started and finished and how many tokens there are."""

    at: float
    started: int
    finished: int
    tokens: int


def all_decoding(marks: Sequence[StepMark], batch: int) -> tuple[int, float]:
    """(tokens, seconds) of the steps in which every stream of the batch decoded, and none prefilled.

    The span opens with the step that gave the last stream its first token and closes with the first step in which
    a stream finished. Raises BenchmarkError if there was no such step, as when answers are shorter than prefill.
    """
    opening = next(mark for mark in marks if mark.started == batch)
    closing = next(mark for mark in marks if mark.finished > 0)
    if closing.at <= opening.at:
        raise BenchmarkError("no step decoded all streams together: raise --output-len")
    return closing.tokens - opening.tokens, closing.at - opening.at


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--kv-cache-memory", type=int, metavar="BYTES")
    # Random weights soon repeat themselves, which would flatter guesses: off unless asked for.
    parser.add_argument("--speculation", action="store_true", help="let sequences guess their next tokens")


def engine_config(args: argparse.Namespace, *, prefix_caching: bool = True) -> EngineConfig:
    """What `add_engine_arguments` asked for."""
    return EngineConfig(
        model_path=args.model,
        model_name="benchmark",
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_cache_memory=args.kv_cache_memory,
        num_threads=args.threads,
        prefix_caching=prefix_caching,
        speculation=args.speculation,
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Load the engine and time every batch size. Raises BenchmarkError or QuillError."""
    engine = LLMEngine(engine_config(args))
    vocab_size = engine.runner.model_config.vocab_size
    workload = Workload(args.prompt_len, args.output_len, vocab_size)
    benchmark = OfflineBenchmark(engine, workload, max(args.batches))
    batches = {}
    for batch in args.batches:
        timings = repeat_for(args.seconds, partial(benchmark.run_batch, batch))
        batches[str(batch)] = rates(timings, batch, workload)
    info = engine.info
    return {
        "peer": "quill",
        "variant": info.dtype if args.quantization == "none" else args.quantization,
        "device": info.device,
        "attention_backend": info.attention_backend,
        "max_num_batched_tokens": info.max_num_batched_tokens,
        "threads": args.threads,
        "prompt_len": args.prompt_len,
        "output_len": args.output_len,
        "load_seconds": info.load_seconds,
        "batches": batches,
    }


def print_table(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"engine alone: {figures['variant']} on {figures['device']}, tokens/s"
    table = Table(title=title, title_justify="left")
    for column in ("streams", "prefill", "decode only", "end to end"):
        table.add_column(column, justify="right")
    for batch, row in figures["batches"].items():
        table.add_row(batch, *(f"{row[key]:,.0f}" for key in ("prefill", "decode", "end_to_end")))
    Console().print(table)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=(__doc__ or "").split("\n")[0])
    add_engine_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="numbers of streams")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.5, help="time to spend per number of streams")
    parser.add_argument("--json-only", action="store_true", help="no table")
    return parser.parse_args(argv)


def use_engine_environment() -> None:
    """Start this process again under the variables that the server gives its engine: libraries read them at load."""
    environment = engine_environment(os.environ)
    if environment != dict(os.environ):
        os.execve(sys.executable, sys.orig_argv, environment)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        figures = measure(args)
    except (BenchmarkError, QuillError) as error:
        print(f"offline benchmark failed: {error}", file=sys.stderr)
        return EXIT_REFUSED if isinstance(error, ConfigError) else 1
    if not args.json_only:
        print_table(figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    # Not in main(): replacing the process is for a command of its own, never for a caller in the same process.
    use_engine_environment()
    sys.exit(main())
