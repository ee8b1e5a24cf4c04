"""FLOP/s that a device reaches at most: what MFU is measured against.

GPUs: dense figures (no 2:4 sparsity) of the makers' data sheets, for products that accumulate in float32.
CPUs: no data sheet says what a given machine does with one thread or many, so a matrix product is timed.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class _Peak:
    """TFLOP/s: 16-bit tensor cores, TF32 (None: the card has no TF32), float32."""

    half: float
    tf32: float | None
    float32: float


# Words of the name that torch reports; the first entry whose words it holds, side by side, counts.
# V100, T4 and other Turing cards have no bfloat16 units: theirs is the float16 figure.
# A module with two dies (MI250, MI250X) appears as two devices, each with half of the data sheet's figure.
_GPUS: tuple[tuple[str, _Peak], ...] = (
    ("GB300", _Peak(2_500, 1_250, 80)), ("GB200", _Peak(2_500, 1_250, 80)),
    ("B300", _Peak(2_250, 1_125, 75)), ("B200", _Peak(2_250, 1_125, 75)),
    ("GH200", _Peak(989, 494, 67)), ("H200 NVL", _Peak(835, 417, 60)), ("H200", _Peak(989, 494, 67)),
    ("H100 PCIe", _Peak(756, 378, 51)), ("H100 NVL", _Peak(835, 417, 60)), ("H100", _Peak(989, 494, 67)),
    ("H800 PCIe", _Peak(756, 378, 51)), ("H800", _Peak(989, 494, 67)), ("H20", _Peak(148, 74, 44)),
    ("A100", _Peak(312, 156, 19.5)), ("A800", _Peak(312, 156, 19.5)), ("A30", _Peak(165, 82, 10.3)),
    ("L40S", _Peak(362, 183, 91.6)), ("L40", _Peak(181, 90.5, 90.5)), ("L4", _Peak(121, 60, 30.3)),
    ("A40", _Peak(149.7, 74.8, 37.4)), ("A10G", _Peak(70, 35, 31.5)), ("A10", _Peak(125, 62.5, 31.2)),
    ("RTX 6000 Ada", _Peak(364, 182, 91.1)), ("RTX A6000", _Peak(154.8, 77.4, 38.7)),
    ("RTX 5090", _Peak(209.5, 104.8, 104.8)), ("RTX 4090", _Peak(165.2, 82.6, 82.6)),
    ("RTX 3090 Ti", _Peak(80, 40, 40)), ("RTX 3090", _Peak(71, 35.6, 35.6)),
    ("V100 PCIE", _Peak(112, None, 14)), ("V100", _Peak(125, None, 15.7)), ("T4", _Peak(65, None, 8.1)),
    ("MI325X", _Peak(1_307, 654, 163)), ("MI300X", _Peak(1_307, 654, 163)),
    ("MI250X", _Peak(191.5, None, 47.9)), ("MI250", _Peak(181, None, 45.3)), ("MI210", _Peak(181, None, 45.3)),
)  # fmt: skip

# Such words after a known name make another product, or a slice of one; better no figure than a wrong one.
_OTHER_PRODUCT = frozenset({"laptop", "max", "mobile", "d", "ti", "super", "mig"})


def peak_flops(device: torch.device, dtype: torch.dtype, *, tf32: bool = True) -> float | None:
    """FLOP/s that MFU is measured against, for products in `dtype`; None where it is not known.

    `tf32` says whether float32 products run in TF32 where the card can.
    """
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), dtype, tf32=tf32)
    return measured_cpu_peak(dtype) if device.type == "cpu" else None


def gpu_peak_flops(name: str, dtype: torch.dtype, *, tf32: bool = True) -> float | None:
    """The data sheet's dense FLOP/s of the GPU that torch calls `name`; None for a GPU that is not in the table."""
    words = _words(name)
    for key, peak in _GPUS:
        wanted = _words(key)
        if _holds(words, wanted) and not _OTHER_PRODUCT & (set(words) - set(wanted)):
            if dtype in (torch.bfloat16, torch.float16):
                return peak.half * 1e12
            return (peak.tf32 if tf32 and peak.tf32 else peak.float32) * 1e12
    return None


def measured_cpu_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product on this CPU with torch's threads; timed once per process."""
    # CPUs multiply bfloat16 fast and float16 hardly ever, so 16-bit training is measured against the former.
    return _time_products(torch.bfloat16 if dtype == torch.float16 else dtype, torch.get_num_threads())


@functools.cache
def _time_products(dtype: torch.dtype, threads: int) -> float:
    """Best of sizes that double until one product takes 15 ms: large enough for many cores, short on few.

    `threads` is only the cache's key: the figure is that of so many threads.
    """
    best, size = 0.0, 512
    while True:
        seconds = _fastest_product(size, dtype)
        best = max(best, 2.0 * size**3 / seconds)
        if seconds > 0.015 or size >= 8_192:
            return best
        size *= 2


def _fastest_product(size: int, dtype: torch.dtype, repeats: int = 8) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    result = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=result)  # warm-up: threads start, the library chooses its kernel
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=result)
        times.append(time.perf_counter() - start)
    return min(times)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _holds(words: list[str], wanted: list[str]) -> bool:
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))
