"""A step's small arrays to the device and back, each way in one go and without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Views begin at multiples of this many bytes, so that kernels may read them in wide words.
_ALIGNMENT = 64
_DTYPES = {
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class HostToDevice:
    """Gathers arrays in one staging buffer, pinned for CUDA, and sends them without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def send(self, arrays: Sequence[np.ndarray], target: Tensor | None = None) -> list[Tensor]:
        """The arrays as tensors on the device: contiguous views of one new allocation, or of `target` [bytes] uint8,
        where arrays of the same sizes always come to lie at the same places."""
        starts, total = _layout(arrays)
        staging = self._reserve(total)
        for array, start in zip(arrays, starts, strict=True):
            staging[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        on_device = torch.empty(total, dtype=torch.uint8, device=self._device) if target is None else target[:total]
        on_device.copy_(self._staging[:total], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return view_arrays(on_device, arrays)

    def _reserve(self, size: int) -> np.ndarray:
        """The staging buffer's bytes, at least `size` of them, no longer read by an earlier copy."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._staging.shape[0] < size:
            pinned = self._device.type == "cuda"
            self._staging = torch.empty(2 * size, dtype=torch.uint8, pin_memory=pinned)
            self._copied = torch.cuda.Event() if pinned else None
        bytes_view: np.ndarray = self._staging.numpy()
        return bytes_view


def view_arrays(buffer: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """The parts of `buffer` [bytes] uint8 that arrays of these shapes and types take, as tensors."""
    starts, _ = _layout(arrays)
    return [
        buffer[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def num_bytes(arrays: Sequence[np.ndarray]) -> int:
    """How long a buffer for these arrays must be."""
    return _layout(arrays)[1]


def _layout(arrays: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """(where each array begins, the bytes of all)"""
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, total


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Tensors on their way to the host. They hold what the originals held when the copy was begun, whatever the device
    does to these since."""

    _tensors: list[Tensor]
    _copied: torch.cuda.Event | None

    @classmethod
    def begin(cls, tensors: Sequence[Tensor]) -> HostCopy:
        """Of tensors on one device."""
        if not tensors or not tensors[0].is_cuda:
            return cls([tensor.clone() for tensor in tensors], None)
        copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        copied = torch.cuda.Event()
        copied.record()
        return cls(copies, copied)

    def wait(self) -> list[Tensor]:
        """The copies, once they are there: a wait for the steps up to theirs, not for later ones."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors
