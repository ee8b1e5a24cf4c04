"""Run by test_cuda_graph.py in a process of its own: a whole engine as on CUDA, in Triton's interpreter on the CPU.

Decode steps run padded, as their graphs would, with the attention and sampling kernels, and each is launched before the
tokens of the one before are known. Only the capture itself is missing.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import tempfile
from pathlib import Path

import torch

from model.attention_cuda import TritonBackend
from model.config import ModelConfig
from model.kv_cache import PagedKVCache
from model.sampling_params import SamplingParams
from server.engine import model_runner
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from tests.engine.conftest import MODELS
from tests.engine.mixed_load import (
    cache_bytes,
    make_engine,
    make_lively_checkpoint,
    mixed_requests,
    run_alone,
    run_under_load,
)
from tests.engine.uncaptured import UncapturedGraphs
from tests.model.triton_interpreted import mend_interpreter


def use_triton(config: ModelConfig, dtype: torch.dtype) -> None:
    """Let engines on the CPU have the backend of CUDA."""
    backend = TritonBackend(config, dtype)
    model_runner.select_backend = lambda *args, **kwargs: backend  # type: ignore[assignment]


def requests() -> list[AddRequest]:
    """Greedy and drawn, some with what the graph cannot do; few tokens, since the interpreter is slow."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs")
    return [
        AddRequest(
            each.request_id,
            each.prompt_token_ids,
            SamplingParams(
                max_tokens=1 + each.request_id % 9,
                ignore_eos=True,
                **{name: getattr(each.params, name) for name in names},
            ),
            0.0,
        )
        for each in mixed_requests(14, seed=8)
    ]


def check(name: str, folder: Path) -> None:
    config = MODELS[name]
    make_lively_checkpoint(config, folder)
    expected = run_alone(make_engine(folder, "float32"), requests())
    blocks = cache_bytes(make_engine(folder, "float32", attention_backend="torch"), 14)
    native = model_runner.select_backend
    use_triton(config, torch.float32)
    settings = {"attention_backend": "triton", "overlap": True, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    engine: LLMEngine = make_engine(folder, "float32", kv_cache_memory=blocks, **settings)
    assert isinstance(engine.runner.cache, PagedKVCache)
    graphs = UncapturedGraphs(engine.runner)
    engine.runner._graphs = graphs
    model_runner.select_backend = native
    found = run_under_load(engine, requests(), seed=2)
    for number, answer in expected.items():
        assert found[number].finish_reason == answer.finish_reason, (name, number)
    # Logits differ in their last bits from those of the CPU's kernels: a draw may fall on either side of a bound.
    same = sum(found[number].token_ids == answer.token_ids for number, answer in expected.items())
    assert same >= len(expected) - 1, (name, same, len(expected))
    assert len(graphs.replayed) > 8
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    print(name, f"{same} of {len(expected)} equal,", len(graphs.replayed), "steps replayed", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    mend_interpreter()
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            check(name, Path(folder) / "model")
    print("the engine on the interpreted kernels answers as on the CPU's")


if __name__ == "__main__":
    main()
