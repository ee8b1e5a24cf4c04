"""Is what runs on the device right? Attention and sampling kernels against torch's, the engine against generate()."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_engine import BLOCK_SIZES, start_engine
from benchmarks.gpu_job import Figures, Job
from benchmarks.gpu_sampling import check_sampling
from benchmarks.workload import Workload, random_prompts
from model.attention_check import TOLERANCES, check_backend
from model.backends import select_backend
from model.checkpoint import load_model
from model.config import ModelConfig
from model.generate import generate
from model.presets import create_config
from model.sampling_params import SamplingParams
from model.transformer import Transformer
from server.engine.messages import AddRequest

# heads, kv heads, head_dim, window; GPT-2's first
HEADS = ((12, 12, 64, None), (32, 8, 128, None), (16, 4, 80, 100))
TYPES = (torch.bfloat16, torch.float16, torch.float32)


class MissingTokensError(Exception):
    """The engine did not generate as much as was asked for."""


def measure(job: Job, figures: Figures) -> None:
    """What the other parts rest on; `measure_backends` has the rest."""
    for backend in BLOCK_SIZES[job.device]:
        _add_backend(job, figures, backend, HEADS[0], job.torch_dtype)
    for streams in (job.streams[0], job.streams[-1]):
        figures.add(f"sampling/{streams}", partial(check_sampling, job, streams))
    for dtype in dict.fromkeys(("float32", job.dtype)):
        figures.add(f"greedy {dtype}", partial(compare_greedy, job, dtype))


def measure_backends(job: Job, figures: Figures) -> None:
    """Every backend with every kind of heads in every type that it offers."""
    for heads, dtype, backend in product(HEADS, TYPES, BLOCK_SIZES[job.device]):
        if backend == "varlen" and dtype == torch.float32:
            continue  # it does not offer that
        _add_backend(job, figures, backend, heads, dtype)


def _add_backend(
    job: Job, figures: Figures, backend: str, heads: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    num_heads, kv_heads, head_dim, window = heads
    name = (
        f"attention {backend} {num_heads}/{kv_heads} x {head_dim} window {window} {str(dtype).removeprefix('torch.')}"
    )
    figures.add(name, partial(check_attention, job.device, backend, _head_config(*heads), dtype))


def _head_config(heads: int, kv_heads: int, head_dim: int, window: int | None) -> ModelConfig:
    gpt2 = create_config("gpt2")
    return replace(gpt2, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, sliding_window=window)


def check_attention(device: str, name: str, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Raises BackendMismatchError, or ConfigError for a backend that cannot run here."""
    block_size = BLOCK_SIZES[device][name]
    backend = select_backend(name, config, device, dtype, block_size)
    check_backend(backend, config, torch.device(device), dtype, block_size)
    return {"within": TOLERANCES[dtype]}


def compare_greedy(job: Job, dtype: str) -> dict[str, Any]:
    """How many prompts the engine continues as generate() does.

    Where they part, `largest_gap` is by how much generate()'s token led the engine's in the logits that it was chosen
    from: between two tokens that are all but equal, a sum in another order may decide.
    """
    model = load_model(Path(job.model), dtype=getattr(torch, dtype), device=job.device)
    prompts = prompts_of_many_lengths(job, model.config.vocab_size)
    params = SamplingParams(max_tokens=job.compared_tokens, temperature=0.0, ignore_eos=True)
    with torch.inference_mode():
        alone = [generate(model, prompt, params).token_ids for prompt in prompts]
    together = generate_together(job, dtype, prompts, params)
    triples = zip(prompts, alone, together, strict=True)
    gaps = [lead(model, prompt, ours, theirs) for prompt, ours, theirs in triples if ours != theirs]
    del model
    gc.collect()
    return {
        "equal": len(prompts) - len(gaps),
        "prompts": len(prompts),
        "tokens": sum(map(len, alone)),
        "largest_gap": max(gaps, default=0.0),
    }


def prompts_of_many_lengths(job: Job, vocab_size: int) -> list[list[int]]:
    """From a few tokens to `prompt_len`, so that steps mix chunks and decodes of different contexts."""
    prompts = random_prompts(Workload(job.prompt_len, 0, vocab_size), job.compared, seed=5)
    return [prompt[: -(-job.prompt_len * (row + 1) // job.compared)] for row, prompt in enumerate(prompts)]


def generate_together(job: Job, dtype: str, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """What the engine generates with all prompts handed in at once."""
    engine = start_engine(job, dtype=dtype)
    tokens: list[list[int]] = [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        engine.add(AddRequest(row, prompt, params, 0.0))
    while engine.has_unfinished:
        for output in engine.step().outputs:
            tokens[output.request_id] += output.token_ids
    return tokens


@torch.inference_mode()
def lead(model: Transformer, prompt: list[int], expected: list[int], found: list[int]) -> float:
    """At the first difference: the logit of the expected token minus that of the other.

    Raises MissingTokensError unless both have as many tokens.
    """
    if len(expected) != len(found):
        raise MissingTokensError(f"the engine generated {len(found)} tokens where generate() did {len(expected)}")
    place = next(index for index, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    input_ids = torch.tensor([prompt + expected[:place]], device=model.device)
    logits = model.compute_logits(model(input_ids)[:, -1])[0].float()
    return float(logits[expected[place]] - logits[found[place]])
