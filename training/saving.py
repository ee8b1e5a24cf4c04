"""Saving beside training: a snapshot on the training thread, everything that touches the disk on one other thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from training.distributed import Distributed, full_tensor


class Snapshots:
    """Copies tensors to the CPU, into the memory of the last snapshot where it fits (pinned for a GPU's)."""

    def __init__(self, distributed: Distributed) -> None:
        self._distributed = distributed
        self._memory: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 copies that the next call overwrites, elsewhere nothing. Collective: FSDP's tensors are gathered.

        One tensor at a time is whole on the device.
        """
        copies: dict[str, Tensor] = {}
        on_gpu = self._distributed.device.type == "cuda"
        for name, tensor in tensors.items():
            whole = full_tensor(tensor.detach())
            if self._distributed.is_main:
                copies[name] = self._room(name, whole, pinned=on_gpu).copy_(whole, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(self._distributed.device)
        return copies

    def _room(self, name: str, like: Tensor, *, pinned: bool) -> Tensor:
        room = self._memory.get(name)
        if room is None or (room.shape, room.dtype) != (like.shape, like.dtype):
            room = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
            self._memory[name] = room
        return room


class Saver:
    """Runs one job at a time, on its own thread with `background`. As a context manager it waits for the last one.

    What a job raises is raised by the next `submit`, `wait` or `check`, or at the end of the `with` block unless
    that ends by another exception.
    """

    def __init__(self, *, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "saver") if background else None
        self._running: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Waits for the job before, then starts this one; without `background`, does it."""
        self.wait()
        if self._pool is None:
            job()
        else:
            self._running = self._pool.submit(job)

    def wait(self) -> None:
        """Returns when nothing is being written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def check(self) -> None:
        """Raises what a finished job raised, without waiting for one that runs."""
        if self._running is not None and self._running.done():
            self.wait()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if error is None:
            self.wait()
