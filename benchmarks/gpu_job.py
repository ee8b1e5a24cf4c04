"""What a part of the GPU benchmark is told, and how it reports: both cross the boundary of its process."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TextIO

import torch

NO_TIME = {"skipped": "no time"}


class SkippedError(Exception):
    """A measurement that does not apply here, which is no fault."""


class DeviceLostError(Exception):
    """The CUDA context is broken: nothing more can be measured in this process."""


@dataclass(frozen=True, slots=True)
class Job:
    """`model` is a GPT-2 124M folder; `large_model` that of the large preset, made by its part if it is not there.

    `streams` ascend: the first is one stream's speed, the last the throughput that HTTP and peers are compared at.
    `compared` prompts are continued by `compared_tokens` greedy tokens, by the engine and by generate().
    `seconds` are spent on each figure, `limit` on the whole part. `tiny` takes small stand-ins for everything large.
    """

    model: str
    large_model: str
    large_preset: str = "gpt2-xl"
    device: str = "cuda"
    dtype: str = "bfloat16"
    streams: tuple[int, ...] = (1, 32, 256)
    prompt_len: int = 256
    output_len: int = 256
    compared: int = 32
    compared_tokens: int = 64
    kv_cache_memory: int = 10 * 2**30
    seconds: float = 2.0
    limit: float = 600.0
    tiny: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


class Figures:
    """Results by name. Each is a line of JSON as soon as it is there, so that a part that is ended loses none."""

    def __init__(self, out: TextIO, limit: float) -> None:
        self._out = out
        self._deadline = perf_counter() + limit

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure and write; what goes wrong is written in its place. Raises DeviceLostError."""
        if perf_counter() > self._deadline:
            self._write(name, NO_TIME)
            return
        try:
            self._write(name, measure())
        except SkippedError as reason:
            self._write(name, {"skipped": str(reason)})
        except Exception as error:  # one broken kernel must not hide what the others do
            self._write(name, {"error": describe(error)})
            _require_device()
        gc.collect()
        if _uses_cuda():
            torch.cuda.empty_cache()

    def _write(self, name: str, value: dict[str, Any]) -> None:
        print(json.dumps({"name": name, "value": value}), file=self._out, flush=True)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:1_500]}"


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _require_device() -> None:
    """After an illegal access every later call of the process fails, whatever it does."""
    if not _uses_cuda():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLostError(f"the device is lost to this process: {error}") from error


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4 if abs(value) < 10 else 1) for name, value in figures.items()}
