"""The engine alone on the device: one stream and many, greedy and sampled, and with one thing other than by default."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_job import Figures, Job, SkippedError, rounded
from benchmarks.offline import OfflineBenchmark
from benchmarks.workload import Workload, rates, repeat_for
from model.checkpoint import save_model
from model.presets import create_config
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine

PARAMS = {"greedy": SamplingParams(temperature=0.0), "sampled": SamplingParams(temperature=0.8, top_p=0.95)}
BLOCK_SIZES = {"cuda": {"varlen": 256, "triton": 16}, "cpu": {"torch": 16}}
"""The attention backends of a device, and the block size that each is measured with."""

TINY = {"num_layers": 2, "num_heads": 2, "hidden_size": 64}


def start_engine(job: Job, model: str | None = None, dtype: str | None = None, **settings: Any) -> LLMEngine:
    """With the server's defaults, but a cache that holds all streams, and no guesses, which random weights flatter."""
    return LLMEngine(
        EngineConfig(
            model or job.model, "benchmark", job.device, dtype or job.dtype,
            kv_cache_memory=job.kv_cache_memory, speculation=False, **settings,
        )
    )  # fmt: skip


def measure(job: Job, figures: Figures) -> None:
    """The defaults: graphs, and the next step scheduled while one runs."""
    engine = start_engine(job)
    figures.add("start", partial(describe_engine, engine))
    first, *others = job.streams
    _add(job, figures, engine, "greedy", (first, others[-1], *others[:-1]))
    _add(job, figures, engine, "sampled", (others[-1], first, *others[:-1]))


def measure_variant(job: Job, figures: Figures, settings: dict[str, Any]) -> None:
    """One thing other than by default; the ends of the range suffice to tell what it is worth."""
    engine = start_engine(job, **settings)
    figures.add("start", partial(describe_engine, engine))
    for kind in PARAMS:
        _add(job, figures, engine, kind, (job.streams[0], job.streams[-1]))


def measure_varlen(job: Job, figures: Figures) -> None:
    """torch's attention of many lengths in place of our kernels; it wants larger blocks."""
    if job.device == "cuda":
        measure_variant(job, figures, {"attention_backend": "varlen", "block_size": BLOCK_SIZES["cuda"]["varlen"]})
    else:
        figures.add("start", _skip_varlen)


def _skip_varlen() -> dict[str, Any]:
    raise SkippedError("torch's varlen attention runs on CUDA only")


def measure_large(job: Job, figures: Figures) -> None:
    """One stream of GPT-2 XL, whose steps are little but reading the weights."""
    make_on_device(job)
    engine = start_engine(job, job.large_model)
    figures.add("start", partial(describe_engine, engine))
    _add(job, figures, engine, "greedy", job.streams[:1])


def describe_engine(engine: LLMEngine) -> dict[str, Any]:
    info, runner = engine.info, engine.runner
    return {
        "load_seconds": round(info.load_seconds, 1),
        "attention_backend": info.attention_backend,
        "weight_bytes": runner.num_parameters * runner.dtype.itemsize,
        "num_blocks": info.num_blocks,
        "max_num_seqs": info.max_num_seqs,
        "max_num_batched_tokens": info.max_num_batched_tokens,
    }


def _add(job: Job, figures: Figures, engine: LLMEngine, kind: str, streams: tuple[int, ...]) -> None:
    for number in streams:
        figures.add(f"{kind}/{number}", partial(time_streams, job, engine, kind, number))


def time_streams(job: Job, engine: LLMEngine, kind: str, streams: int) -> dict[str, float]:
    """Tokens per second, as `benchmarks.offline` measures them."""
    workload = Workload(job.prompt_len, job.output_len, engine.runner.model_config.vocab_size)
    benchmark = OfflineBenchmark(engine, workload, streams, PARAMS[kind])
    first_seed = 500 * list(PARAMS).index(kind)  # no kind finds the prompts of another in the prefix cache
    timings = repeat_for(job.seconds, lambda seed: benchmark.run_batch(streams, first_seed + seed))
    return rounded(rates(timings, streams, workload))


def make_on_device(job: Job) -> None:
    """The large checkpoint, unless it is there, with random weights: a card draws them sooner than a CPU."""
    folder = Path(job.large_model)
    if (folder / "config.json").exists():
        return
    with torch.device(job.device):
        model = Transformer(create_config(job.large_preset, **(TINY if job.tiny else {})))
    model.init_weights(0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(folder, model.to(job.torch_dtype).cpu(), tokenizer=Tokenizer.gpt2())
