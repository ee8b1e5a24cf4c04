"""What this machine offers a training run: devices, their types and peaks, and what torch.compile needs."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from training.device_peaks import gpu_peak_flops, measured_cpu_peak

_CPU_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, slots=True)
class Device:
    """`bfloat16` says whether the hardware multiplies it. Peaks are dense FLOP/s, None where they are not known.

    `peak_source` is "data sheet" or "measured" (a matrix product, timed). `trains` is False for what is found but
    not used.
    """

    name: str
    backend: str
    description: str
    memory_bytes: int
    bfloat16: bool
    peak_bfloat16: float | None = None
    peak_float32: float | None = None
    peak_source: str | None = None
    trains: bool = True


@dataclass(frozen=True, slots=True)
class Hardware:
    """`compiles` are the device types for which torch.compile finds its compiler."""

    system: str
    python: str
    torch: str
    devices: Sequence[Device]
    threads: int
    compiles: Sequence[str]


def detect_hardware() -> Hardware:
    """Looks at everything that torch was built for. Times a matrix product on the CPU, a fraction of a second."""
    devices = [*_gpus(), *_unused_accelerators(), _cpu()]
    return Hardware(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        devices=devices,
        threads=torch.get_num_threads(),
        compiles=_compiling_devices(devices),
    )


def _gpus() -> list[Device]:
    if not torch.cuda.is_available():
        return []
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> Device:
    # torch drives AMD's cards under the name cuda too.
    properties = torch.cuda.get_device_properties(index)
    half, single = (gpu_peak_flops(properties.name, dtype) for dtype in (torch.bfloat16, torch.float32))
    rocm = torch.version.hip is not None
    version = f"ROCm {torch.version.hip}" if rocm else f"CUDA {torch.version.cuda}"
    return Device(
        f"cuda:{index}", "rocm" if rocm else "cuda",
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, {version}",
        properties.total_memory, rocm or properties.major >= 8, half, single, "data sheet" if half else None,
    )  # fmt: skip


def _unused_accelerators() -> list[Device]:
    found = []
    if torch.backends.mps.is_available():
        found.append(Device("mps", "mps", "Apple GPU", _system_memory(), True, trains=False))
    if torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(index)
            found.append(Device(f"xpu:{index}", "xpu", properties.name, properties.total_memory, True, trains=False))
    return found


def _cpu() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    return Device(
        "cpu", "cpu", f"{_cpu_name()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}", _system_memory(),
        bool(_CPU_BFLOAT16_FLAGS & flags), measured_cpu_peak(torch.bfloat16), measured_cpu_peak(torch.float32),
        "measured",
    )  # fmt: skip


def _cpu_name() -> str:
    return next(iter(_cpuinfo("model name")), "") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    """Linux names the instructions that a CPU has: `flags` on x86, `Features` on Arm."""
    return {flag for key in ("flags", "Features") for line in _cpuinfo(key)[:1] for flag in line.split()}


def _cpuinfo(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _compiling_devices(devices: Sequence[Device]) -> list[str]:
    """torch.compile writes C++ for the CPU and Triton for GPUs, which itself calls a C compiler."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if not any(name and shutil.which(name) for name in names):
        return []
    has_gpu = any(device.name.startswith("cuda") for device in devices)
    return ["cpu", *(["cuda"] if has_gpu and importlib.util.find_spec("triton") else [])]
