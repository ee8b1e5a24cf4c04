"""The sampling kernel beside torch's operators: the same tokens, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_device import time_call, time_eager
from benchmarks.gpu_job import Figures, Job, SkippedError, rounded
from model.sampling import Sampler, SamplingRow
from model.sampling.draw import padded_width
from model.sampling_params import SamplingParams

VOCAB_SIZE = 50_257
CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k": SamplingParams(top_k=50),
    "min_p": SamplingParams(temperature=1.2, min_p=0.1),
    "all": SamplingParams(temperature=0.9, top_k=200, top_p=0.9, min_p=0.02),
}
# A draw that falls on the border between two tokens may go to either: sums differ in their last bits.
_LEAST_EQUAL = 0.99
_LEAST_ROWS = 512


class SamplingMismatchError(Exception):
    """The kernel draws other tokens than torch's operators."""


def check_sampling(job: Job, rows: int) -> dict[str, Any]:
    """Batches of `rows`, each row with its own case: enough draws in all to tell chance from a fault.

    Raises SamplingMismatchError, SkippedError where there is no kernel.
    """
    kernel = _kernel(job)
    batches = -(-_LEAST_ROWS // rows)
    params = [replace(list(CASES.values())[row % len(CASES)], seed=row) for row in range(batches * rows)]
    # Peaked: from a wide nucleus the torch path on the CPU draws in another way, to the same distribution.
    logits = _logits(len(params), job, spread=6.0)
    found = torch.cat(
        [kernel(logits[start : start + rows], params[start : start + rows]) for start in range(0, len(params), rows)]
    )
    sampler = Sampler(VOCAB_SIZE)
    batch = sampler.build_batch([SamplingRow(each) for each in params])
    expected = sampler.sample(logits.cpu(), batch, torch.zeros(len(params), dtype=torch.int64)).token_ids
    same = expected == found.cpu()
    greedy = torch.tensor([each.is_greedy for each in params])
    figures = {"equal": int(same.sum()), "rows": len(params), "greedy_equal": int(same[greedy].sum())}
    if not bool(same[greedy].all()) or figures["equal"] < _LEAST_EQUAL * len(params):
        raise SamplingMismatchError(f"{figures['equal']} of {len(params)} tokens are torch's")
    return figures


def measure(job: Job, figures: Figures) -> None:
    """Microseconds of a batch: the kernel alone, and torch's operators with their launches."""
    for rows in dict.fromkeys((job.streams[-1], job.streams[0])):
        for name in CASES:
            figures.add(f"{name}/{rows}", partial(time_sampling, job, name, rows))


def time_sampling(job: Job, case: str, rows: int) -> dict[str, float]:
    logits = _logits(rows, job, spread=2.5)  # about as peaked as a trained model's
    params = [replace(CASES[case], seed=row) for row in range(rows)]
    microseconds = {"torch": time_eager(partial(_torch_sampler(job, params), logits), job.device)}
    try:
        microseconds["kernel"] = time_call(_prepared(job, logits, params), job.device)
    except SkippedError:
        if not job.tiny:
            raise
    return rounded(microseconds)


def _torch_sampler(job: Job, params: list[SamplingParams]) -> Callable[[Tensor], object]:
    sampler = Sampler(VOCAB_SIZE, device=job.device)
    sampler._has_kernel = False  # there is no other way to it on a device that has the kernel
    batch = sampler.build_batch([SamplingRow(each) for each in params])
    assert batch.parameters is None, "torch's operators would not run"
    positions = torch.zeros(len(params), dtype=torch.int64, device=job.device)
    return lambda logits: sampler.sample(logits, batch, positions)


def _kernel(job: Job) -> Callable[[Tensor, list[SamplingParams]], Tensor]:
    """(logits, parameters) to token ids, all at position 0. Raises SkippedError."""

    def sample(logits: Tensor, params: list[SamplingParams]) -> Tensor:
        out = torch.empty(len(params), dtype=torch.int64, device=logits.device)
        _prepared(job, logits, params, out)()
        return out

    _require_kernel(job)
    return sample


def _prepared(job: Job, logits: Tensor, params: list[SamplingParams], out: Tensor | None = None) -> Callable[[], None]:
    """The kernel's launch, and nothing else. Raises SkippedError."""
    _require_kernel(job)
    from model.sampling.rows import RowParameters
    from model.sampling.triton_sampling import sample_rows

    rows, device = len(params), logits.device
    parameters = RowParameters.build(params, VOCAB_SIZE, device)
    positions = torch.zeros(rows, dtype=torch.int64, device=device)
    scratch = torch.empty(rows, padded_width(VOCAB_SIZE), dtype=torch.float32, device=device)
    drawn = torch.empty(rows, dtype=torch.int64, device=device) if out is None else out
    return partial(sample_rows, logits, VOCAB_SIZE, parameters, positions, scratch, drawn)


def _require_kernel(job: Job) -> None:
    if job.device != "cuda":
        raise SkippedError("the sampling kernel runs on CUDA only")


def _logits(rows: int, job: Job, spread: float) -> Tensor:
    """[rows, V], normal with `spread` as the standard deviation."""
    generator = torch.Generator().manual_seed(rows)
    return (spread * torch.randn(rows, VOCAB_SIZE, generator=generator)).to(job.device, job.torch_dtype)
