"""What the prefix cache saves: the first token of requests that share a long prefix, in this process.

    python -m benchmarks.prefix --model DIR --prefix-len 512 --requests 32

All requests are handed in at once, to an engine whose cache holds nothing of the prefix, and each asks for one token.
Prints one JSON object: per setting of the cache the times from the start to the first tokens, in milliseconds, as
medians over the repetitions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from time import monotonic, perf_counter
from typing import Any

from benchmarks.offline import BenchmarkError, add_engine_arguments, engine_config, use_engine_environment
from benchmarks.summary import median, percentile
from benchmarks.workload import EXIT_REFUSED, Workload, random_prompts
from model.errors import ConfigError, QuillError
from model.sampling_params import SamplingParams
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest


def first_tokens(engine: LLMEngine, prompts: Sequence[list[int]], first_id: int) -> list[float]:
    """Milliseconds from handing in all prompts to each one's first token, ascending."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    start = perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add(AddRequest(first_id + index, prompt, params, monotonic()))
    times: list[float] = []
    while engine.has_unfinished:
        outputs = engine.step().outputs
        times += [1e3 * (perf_counter() - start)] * sum(len(output.token_ids) for output in outputs)
    if len(times) != len(prompts):
        raise BenchmarkError(f"the engine gave {len(times)} first tokens, not {len(prompts)}")
    return times


def shared_prompts(args: argparse.Namespace, vocab_size: int, seed: int) -> list[list[int]]:
    """A new prefix for every seed, so that no repetition finds the last one's."""
    prefix = random_prompts(Workload(args.prefix_len, 1, vocab_size), 1, 2 * seed)[0]
    own = random_prompts(Workload(args.own_len, 1, vocab_size), args.requests, 2 * seed + 1)
    return [prefix + tail for tail in own]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both settings of the cache, one engine after the other. Raises BenchmarkError or QuillError."""
    figures: dict[str, Any] = {name: getattr(args, name) for name in ("prefix_len", "own_len", "requests")}
    for name, caching in (("off", False), ("on", True)):
        engine = LLMEngine(engine_config(args, prefix_caching=caching))
        vocab_size = engine.runner.model_config.vocab_size
        runs = [
            first_tokens(engine, shared_prompts(args, vocab_size, seed), seed * args.requests)
            for seed in range(args.repeats + 1)
        ][1:]  # the first one warms up
        cached = engine.stats().prefix_cache_hits
        if caching and not cached:
            raise BenchmarkError("no prompt found its prefix in the cache")
        figures[name] = {
            "first_token_ms_p50": median([percentile(run, 50) for run in runs]),
            "first_token_ms_last": median([run[-1] for run in runs]),
            "cached_tokens": cached,
        }
    return figures


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix", description=(__doc__ or "").split("\n")[0])
    add_engine_arguments(parser)
    parser.add_argument("--prefix-len", type=int, default=512, help="tokens that all prompts begin with")
    parser.add_argument("--own-len", type=int, default=16, help="tokens of each prompt after the prefix")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        figures = measure(args)
    except (BenchmarkError, QuillError) as error:
        print(f"prefix benchmark failed: {error}", file=sys.stderr)
        return EXIT_REFUSED if isinstance(error, ConfigError) else 1
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    use_engine_environment()
    sys.exit(main())
