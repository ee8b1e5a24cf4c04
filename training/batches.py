"""Micro-batches on the device, the next one fetched while the current one is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.data.loader import BatchSize

Pair = tuple[Tensor, Tensor]


class Sequences(Protocol):
    """What the loaders of `training.data` give: sequences by their number in the run."""

    def batch(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
    def size(self, first: int, count: int) -> BatchSize: ...


class MicroBatches:
    """Sequences as inputs and targets [B, T] on `device`; targets are IGNORED (-100) where no loss counts.

    For a GPU the next batch is read and pinned on another thread meanwhile; on the CPU, whose cores are busy with the
    current one, nothing would be gained. A batch depends on its numbers alone, and what was fetched ahead is only
    used if it is what is asked for, so the thread cannot change what is learnt. `stride` is the distance to the next
    batch that will be wanted.
    """

    def __init__(self, loader: Sequences, count: int, stride: int, device: torch.device) -> None:
        self._loader, self._count, self._stride, self._device = loader, count, stride, device
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            # A thread's CUDA device is the first one until it is told: pinning would open a context there.
            self._pool = ThreadPoolExecutor(1, "batches", initializer=lambda: torch.cuda.set_device(device))
        self._ahead: tuple[int, Future[Pair]] | None = None

    def get(self, first: int) -> Pair:
        """Sequences number first … first + count − 1."""
        inputs, targets = self._take(first)
        if self._pool is not None:
            self._ahead = (first + self._stride, self._pool.submit(self._fetch, first + self._stride))
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)

    def size(self, first: int, count: int) -> BatchSize:
        """Tokens and counted targets of sequences number first … first + count − 1, without reading them."""
        return self._loader.size(first, count)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _take(self, first: int) -> Pair:
        if self._ahead is not None and self._ahead[0] == first:
            return self._ahead[1].result()
        return self._fetch(first)

    def _fetch(self, first: int) -> Pair:
        arrays = self._loader.batch(first, self._count)
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return (inputs.pin_memory(), targets.pin_memory()) if self._device.type == "cuda" else (inputs, targets)


def seed_dropout(seed: int, first: int, device: torch.device) -> None:
    """Random numbers for the micro-batch that starts at sequence `first`: no random state has to be kept or shared."""
    value = int(np.random.SeedSequence([seed, first]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    # torch.manual_seed would do, but asks every accelerator there could be, which takes a millisecond.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
