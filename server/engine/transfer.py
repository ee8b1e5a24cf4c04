"""HostToDevice: a step's small arrays on the device, in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Views begin at multiples of this many bytes, so that kernels may read them in wide words.
_ALIGNMENT = 64
_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


class HostToDevice:
    """Gathers int32 and int64 arrays in one staging buffer, pinned for CUDA, and sends them without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def send(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """The arrays as tensors on the device: contiguous views of one new allocation."""
        starts, total = [], 0
        for array in arrays:
            starts.append(total)
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        staging = self._reserve(total)
        for array, start in zip(arrays, starts, strict=True):
            staging[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        on_device = torch.empty(total, dtype=torch.uint8, device=self._device)
        on_device.copy_(self._staging[:total], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return [
            on_device[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]

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
