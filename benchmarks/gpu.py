"""CUDA in one go: are the attention backends right, and how fast are they and the engine with a GPT-2 of 124M?

    python -m benchmarks.gpu [--seconds 2] [--model DIR]

Needs a CUDA device and a few minutes. The last line of the output is one JSON object. A part that fails is
reported in its place, and the others still run; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.machine import describe_versions
from benchmarks.make_model import make_model
from benchmarks.offline import OfflineBenchmark
from benchmarks.workload import Workload, rates, repeat_for
from model.attention_check import PagedStep
from model.backends import select_backend
from model.config import ModelConfig
from model.presets import create_config
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine

# heads, kv heads, head_dim, window
HEADS = ((12, 12, 64, None), (32, 8, 128, None), (16, 4, 80, 100))
BLOCK_SIZES = {"triton": 16, "varlen": 256}
STREAMS = (1, 32, 256)
WORKLOADS = ((64, 128), (768, 128))
ENGINES: dict[str, dict[str, Any]] = {
    "triton": {"attention_backend": "triton"},
    "triton, no graphs": {"attention_backend": "triton", "cuda_graphs": False},
    "varlen": {"attention_backend": "varlen", "block_size": BLOCK_SIZES["varlen"]},
}
KV_CACHE_MEMORY = 10 * 2**30


class Report:
    """Results by name; faults are results too."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.failed = 0

    def add(self, name: str, measure: Callable[[], Any]) -> None:
        started = perf_counter()
        try:
            self.results[name] = measure()
        except Exception as error:  # one broken backend must not hide what the others do
            self.failed += 1
            self.results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {self.results[name]} ({perf_counter() - started:.1f} s)", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def head_config(heads: int, kv_heads: int, head_dim: int, window: int | None) -> ModelConfig:
    gpt2 = create_config("gpt2")
    return replace(gpt2, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, sliding_window=window)


def check(backend: str, config: ModelConfig, dtype: torch.dtype) -> str:
    """Selecting a backend by name compares it with the reference."""
    return select_backend(backend, config, "cuda", dtype, BLOCK_SIZES[backend]).name


def time_attention(backend: str, sequences: int, query_len: int, context: int) -> dict[str, float]:
    """One layer of GPT-2's heads in bfloat16; a decode's bytes are the keys and values read."""
    config, dtype, device = create_config("gpt2"), torch.bfloat16, torch.device("cuda")
    shape = ((query_len, context),) * sequences
    step = PagedStep.random(config, shape, BLOCK_SIZES[backend], dtype, device, seed=0, padding=0)
    attend = partial(step.attend, select_backend(backend, config, device, dtype, BLOCK_SIZES[backend]), None)
    microseconds = time_on_device(attend)
    size = config.num_heads * config.head_dim
    figures = {"microseconds": microseconds}
    if query_len == 1:
        figures["gb_per_second"] = sequences * context * 2 * size * dtype.itemsize / microseconds / 1e3
    else:
        figures["tflops"] = 2 * sequences * context * context * size / microseconds / 1e6
    return {name: round(value, 1) for name, value in figures.items()}


def time_on_device(run: Callable[[], Any], repeats: int = 20) -> float:
    """Microseconds per call, from a graph, so that launching does not count."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                run()
        graph.replay()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def time_engine(model: Path, seconds: float, prompt_len: int, output_len: int, settings: dict[str, Any]) -> Any:
    """Tokens per second of each number of streams, as benchmarks.offline measures them."""
    engine = LLMEngine(
        EngineConfig(str(model), "gpt2", "cuda", "bfloat16", kv_cache_memory=KV_CACHE_MEMORY, **settings)
    )
    workload = Workload(prompt_len, output_len, engine.runner.model_config.vocab_size)
    benchmark = OfflineBenchmark(engine, workload, max(STREAMS))
    figures: dict[str, Any] = {"load_seconds": round(engine.info.load_seconds, 1)}
    for streams in STREAMS:
        timings = repeat_for(seconds, partial(benchmark.run_batch, streams))
        figures[str(streams)] = {name: round(value) for name, value in rates(timings, streams, workload).items()}
    return figures


def run(model: Path, seconds: float) -> Report:
    report = Report()
    for backend, heads, dtype in product(BLOCK_SIZES, HEADS, (torch.bfloat16, torch.float16, torch.float32)):
        if backend == "varlen" and dtype == torch.float32:
            continue  # it does not offer that
        name = f"check {backend} {heads} {str(dtype).removeprefix('torch.')}"
        report.add(name, partial(check, backend, head_config(*heads), dtype))
    for backend in BLOCK_SIZES:
        for streams in STREAMS:
            report.add(f"decode {backend} {streams} x 1024", partial(time_attention, backend, streams, 1, 1024))
        for streams in (1, 8):
            report.add(f"prefill {backend} {streams} x 1024", partial(time_attention, backend, streams, 1024, 1024))
    for (prompt_len, output_len), (name, settings) in product(WORKLOADS, ENGINES.items()):
        measure = partial(time_engine, model, seconds, prompt_len, output_len, settings)
        report.add(f"engine {name} {prompt_len}+{output_len}", measure)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend per number of streams")
    parser.add_argument("--model", type=Path, help="a checkpoint of the gpt2 preset; default: random weights")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "gpt2"
        if args.model is None:
            make_model("gpt2", model)
        report = run(model, args.seconds)
    device = {"device": torch.cuda.get_device_name(), "versions": describe_versions()}
    print(json.dumps(device | {"failed": report.failed, "results": report.results}))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
