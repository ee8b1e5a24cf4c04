"""One layer's attention with GPT-2's heads: decodes against the bytes they read, prefills against their products."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu_device import time_call
from benchmarks.gpu_engine import BLOCK_SIZES
from benchmarks.gpu_job import Figures, Job, rounded
from model.attention_check import PagedStep
from model.backends import select_backend
from model.presets import create_config


def measure(job: Job, figures: Figures) -> None:
    context = 32 if job.tiny else 1_024
    for backend in BLOCK_SIZES[job.device]:
        for streams in job.streams:
            figures.add(f"decode {backend} {streams} x {context}", partial(time_decode, job, backend, streams, context))
        for prompts in (1, 8):
            figures.add(
                f"prefill {backend} {prompts} x {context}", partial(time_prefill, job, backend, prompts, context)
            )


def time_decode(job: Job, backend: str, streams: int, context: int) -> dict[str, float]:
    """One query a stream; the bytes are those of the keys and values that it reads."""
    microseconds, size = _time(job, backend, ((1, context),) * streams)
    bytes_read = 2 * streams * context * size * job.torch_dtype.itemsize
    return rounded({"microseconds": microseconds, "gb_per_second": bytes_read / microseconds / 1e3})


def time_prefill(job: Job, backend: str, prompts: int, context: int) -> dict[str, float]:
    """Whole prompts; two products of context x context, half of each masked, for every head."""
    microseconds, size = _time(job, backend, ((context, context),) * prompts)
    flops = 2 * prompts * context * context * size
    return rounded({"microseconds": microseconds, "tflops": flops / microseconds / 1e6})


def _time(job: Job, name: str, shape: tuple[tuple[int, int], ...]) -> tuple[float, int]:
    """(microseconds, heads x head_dim)"""
    config, dtype, device = create_config("gpt2"), job.torch_dtype, torch.device(job.device)
    block_size = BLOCK_SIZES[job.device][name]
    step = PagedStep.random(config, shape, block_size, dtype, device, seed=0, padding=0)
    backend = select_backend(name, config, device, dtype, block_size)
    return time_call(partial(step.attend, backend, None), job.device), config.num_heads * config.head_dim
