"""The same streams over HTTP: the server as a user starts it, clients that all send at once."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_job import Figures, Job, rounded
from benchmarks.server_process import running_server
from benchmarks.systems import run_json

# Waves of all clients at once: about two seconds of them at the goals' speeds, after a short untimed one.
_WAVES = {True: 8, False: 3}
_LATENCIES = ("ttft_ms", "itl_ms", "tpot_ms")


class PrefixHitError(Exception):
    """Prompts of the run were in the prefix cache, which would flatter."""


def measure(job: Job, figures: Figures) -> None:
    arguments = [
        "--model", job.model, "--device", job.device, "--dtype", job.dtype, "--no-speculation",
        "--kv-cache-memory", str(job.kv_cache_memory), "--log-level", "warning",
    ]  # fmt: skip
    with running_server(arguments, timeout=job.limit) as url:
        for clients in (job.streams[-1], job.streams[0]):
            figures.add(f"greedy/{clients}", partial(drive, job, url, clients))


def drive(job: Job, url: str, clients: int) -> dict[str, Any]:
    """Output tokens per second, prefill included, and latencies. Raises SystemFailedError or PrefixHitError."""
    waves = 1 if job.tiny else _WAVES[clients == 1]
    result = run_json([
        sys.executable, "-m", "benchmarks.serving", "--json-only", "--url", f"{url}/generate", "--mode", "waves",
        "--clients", str(clients), "--requests", str(clients * waves), "--prompt-len", str(job.prompt_len),
        "--output-len", str(job.output_len), "--vocab-size", str(_vocab_size(job)), "--seed", str(clients),
    ])  # fmt: skip
    if result["cached_tokens"]:
        raise PrefixHitError(f"{result['cached_tokens']} prompt tokens came from the prefix cache")
    figures = {
        "end_to_end": result["output_tokens_per_second"],
        "client_cpu_share": result["client_cpu_seconds"] / result["seconds"],
    }
    for name in _LATENCIES:
        if result[name] is not None:
            figures |= {f"{name}_{key}": result[name][key] for key in ("p50", "p99")}
    return {**rounded(figures), "requests": result["requests"]}


def _vocab_size(job: Job) -> int:
    return int(json.loads((Path(job.model) / "config.json").read_text())["vocab_size"])
