"""The workload that every system gets: random prompts of one length, a fixed number of greedy tokens after each.

Standard library only: the peers' environment imports it as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

EXIT_REFUSED = 3
"""The exit code of a script whose engine does not offer here what the options ask of it."""


@dataclass(frozen=True)
class Workload:
    """`prompt_len` and `output_len` are tokens per sequence; `vocab_size` bounds the random ids."""

    prompt_len: int
    output_len: int
    vocab_size: int


def random_prompts(workload: Workload, count: int, seed: int) -> list[list[int]]:
    """`count` prompts of random ids [prompt_len]. Other seeds give other prompts, so no prefix cache can help."""
    rng = random.Random(seed)
    highest = workload.vocab_size - 1
    return [[rng.randint(0, highest) for _ in range(workload.prompt_len)] for _ in range(count)]


@dataclass(frozen=True)
class BatchTiming:
    """Seconds of one batch: until every sequence has its first token, and from there to the end.

    `decode_tokens` were generated within `decode_seconds`; `total_tokens` within both spans together.
    """

    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int
    total_tokens: int
    total_seconds: float


def repeat_for(seconds: float, run: Callable[[int], BatchTiming], *, at_least: int = 1) -> list[BatchTiming]:
    """One untimed run, then `run(seed)` with a new seed each time until `seconds` have passed."""
    run(0)
    timings: list[BatchTiming] = []
    start = perf_counter()
    while len(timings) < at_least or perf_counter() - start < seconds:
        timings.append(run(len(timings) + 1))
    return timings


def rates(timings: list[BatchTiming], batch: int, workload: Workload) -> dict[str, float]:
    """Tokens per second, as sums of tokens over sums of seconds: prefill, decode only, and output end to end."""
    prefill_seconds = sum(t.prefill_seconds for t in timings)
    decode_seconds = sum(t.decode_seconds for t in timings)
    return {
        "prefill": batch * workload.prompt_len * len(timings) / prefill_seconds,
        "decode": sum(t.decode_tokens for t in timings) / decode_seconds,
        "end_to_end": sum(t.total_tokens for t in timings) / sum(t.total_seconds for t in timings),
        "runs": len(timings),
    }
