"""The card, and the limits that figures are held against: how fast it copies memory and multiplies matrices."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu_job import Figures, Job, rounded

# Data-sheet memory bandwidth in GB/s, by what the driver calls the card; the first name that it holds counts.
DATA_SHEET = (
    ("B200", 8_000), ("GH200", 4_900), ("H200", 4_800), ("H100 NVL", 3_900), ("H100 PCIe", 2_000), ("H100", 3_350),
    ("A100-SXM4-80GB", 2_039), ("A100 80GB", 1_935), ("A100", 1_555), ("L40", 864), ("A40", 696), ("A10G", 600),
    ("A10", 600), ("L4", 300), ("T4", 320), ("V100", 900), ("RTX 5090", 1_792), ("RTX 4090", 1_008), ("RTX 3090", 936),
)  # fmt: skip


def measure(job: Job, figures: Figures) -> None:
    figures.add("card", partial(describe_card, job))
    figures.add("copy", partial(time_copy, job))
    figures.add("product", partial(time_product, job))


def describe_card(job: Job) -> dict[str, Any]:
    if job.device != "cuda":
        return {"name": job.device, "data_sheet_gb_per_second": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "data_sheet_gb_per_second": data_sheet_bandwidth(properties.name),
    }


def data_sheet_bandwidth(name: str) -> int | None:
    return next((value for known, value in DATA_SHEET if known in name), None)


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.partition("\n")[0].strip() or None


def time_copy(job: Job) -> dict[str, float]:
    """Bytes read and written in a second, from one buffer that no cache holds to another."""
    size = 2**24 if job.tiny else 2**32
    source = torch.zeros(size, dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    microseconds = time_call(partial(target.copy_, source), job.device, repeats=10)
    return rounded({"gb_per_second": 2 * size / microseconds / 1e3})


def time_product(job: Job) -> dict[str, float]:
    size = 256 if job.tiny else 8_192
    left, right = (torch.randn(size, size, device=job.device).to(job.torch_dtype) for _ in range(2))
    microseconds = time_call(partial(torch.mm, left, right), job.device, repeats=10)
    return rounded({"tflops": 2 * size**3 / microseconds / 1e6})


def time_call(run: Callable[[], Any], device: str, repeats: int = 20) -> float:
    """Microseconds of a call. On CUDA it is captured in a graph, so that launching does not count."""
    with torch.inference_mode():
        if device == "cuda":
            return min(_replay_seconds(_capture(run, repeats)) for _ in range(3)) * 1e6 / repeats
        run()
        start = perf_counter()
        for _ in range(repeats):
            run()
        return (perf_counter() - start) * 1e6 / repeats


def _capture(run: Callable[[], Any], repeats: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()  # the inputs are made on another stream
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()  # compiles what must not be compiled during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            run()
    graph.replay()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def time_eager(run: Callable[[], Any], device: str, repeats: int = 20) -> float:
    """Microseconds of a call with its launches and whatever it waits for."""
    with torch.inference_mode():
        run()
        _synchronize(device)
        start = perf_counter()
        for _ in range(repeats):
            run()
        _synchronize(device)
    return (perf_counter() - start) * 1e6 / repeats


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
