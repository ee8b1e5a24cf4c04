"""transformers on the same weights in the same run: its continuous batching, and generate() for one stream.

Its continuous batching changes from version to version, so that only what the installed one knows is passed to it. It
is measured with its own defaults and with a cache of just the size that is needed; the better counts.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu_job import Figures, Job, SkippedError, rounded
from benchmarks.peers.common import timing_by_difference
from benchmarks.workload import Workload, random_prompts, rates

_WARM_UP_TOKENS = 4
_PROBE_TOKENS = 8
# Of one way to run it. Where all tokens would take longer, fewer are generated.
_SECONDS_ALLOWED = 35.0
_PAGE = 256


class GenerationError(Exception):
    """transformers did not generate what was asked for."""


def measure(job: Job, figures: Figures) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.torch_dtype, local_files_only=True)
    model = model.to(job.device).eval()
    streams = job.streams[-1]
    if not job.tiny:  # on a CPU its default takes more than half of the memory
        figures.add(f"batching, default/{streams}", partial(time_batching, job, model, streams, {}))
    figures.add(f"batching, sized/{streams}", partial(time_batching, job, model, streams, cache_size(job, streams)))
    figures.add("generate/1", partial(time_generate, job, model))


def cache_size(job: Job, streams: int) -> dict[str, int]:
    """Options for a cache that holds the streams, and for steps of the size of our engine's."""
    per_stream = -(-(job.prompt_len + job.output_len) // _PAGE) + 1
    return {"num_blocks": streams * per_stream, "max_batch_tokens": 512 if job.tiny else 8_192}


def time_batching(job: Job, model: Any, streams: int, options: dict[str, int]) -> dict[str, float]:
    """Output tokens per second of all streams at once, prefill included, after two short rounds that warm up and tell
    how many tokens there is time for."""
    workload = Workload(job.prompt_len, job.output_len, model.config.vocab_size)
    prompts = [random_prompts(workload, streams, seed) for seed in (1, 2, 3)]
    open_manager = getattr(model, "continuous_batching_context_manager", None)
    if open_manager is None:
        raise SkippedError("this version of transformers has no continuous batching")
    with open_manager(**_arguments(open_manager, workload, streams, options)) as manager:
        generate_all(manager, prompts[0], min(_WARM_UP_TOKENS, job.output_len))
        probe = min(_PROBE_TOKENS, job.output_len)
        output_len = affordable_tokens(job.output_len, generate_all(manager, prompts[1], probe) / probe)
        seconds = generate_all(manager, prompts[2], output_len)
    return rounded({"end_to_end": streams * output_len / seconds, "seconds": seconds, "output_len": output_len})


def affordable_tokens(output_len: int, seconds_per_token: float) -> int:
    return max(1, min(output_len, int(_SECONDS_ALLOWED / seconds_per_token)))


def generate_all(manager: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds until the last is done. Raises GenerationError unless every prompt got all of its tokens."""
    start = perf_counter()
    manager.add_requests(inputs=prompts, max_new_tokens=new_tokens)
    missing = len(prompts)
    while missing:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise GenerationError("continuous batching stopped before all requests were done")
        elif result.is_finished():
            if result.error is not None or len(result.generated_tokens) != new_tokens:
                raise GenerationError(f"a request got {len(result.generated_tokens)} tokens: {result.error}")
            missing -= 1
    return perf_counter() - start


def _arguments(
    open_manager: Callable[..., Any], workload: Workload, streams: int, options: dict[str, int]
) -> dict[str, Any]:
    from transformers import GenerationConfig

    make: Callable[..., Any] = GenerationConfig
    # An end token of -1 is its way to say none.
    generation = make(max_new_tokens=workload.output_len, do_sample=False, eos_token_id=-1, pad_token_id=0)
    wanted = {
        "generation_config": generation,
        "continuous_batching_config": _batching_config(options),
        "workload_hints": _hints(workload, streams),
    }
    known = inspect.signature(open_manager).parameters
    return {name: value for name, value in wanted.items() if name in known and value is not None}


def _batching_config(options: dict[str, int]) -> Any:
    """Of the options, those that this version has; None where it has no such class."""
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        return None
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    make: Callable[..., Any] = ContinuousBatchingConfig
    return make(**{name: value for name, value in options.items() if name in known})


def _hints(workload: Workload, streams: int) -> Any:
    try:
        from transformers.generation.continuous_batching.utils import WorkloadHints
    except ImportError:
        return None
    return WorkloadHints(workload.prompt_len, workload.output_len, streams)


def time_generate(job: Job, model: Any) -> dict[str, float]:
    """One stream through generate(); without an end token every sequence runs to its full length."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        input_ids = torch.tensor(prompts, device=job.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=new_tokens
            )
        generated = output.shape[1] - input_ids.shape[1]
        if generated != new_tokens:
            raise GenerationError(f"generate returned {generated} tokens, not {new_tokens}")

    workload = Workload(job.prompt_len, job.output_len, model.config.vocab_size)
    generate(random_prompts(workload, 1, seed=3), min(8, job.output_len))
    timing = timing_by_difference(generate, random_prompts(workload, 1, seed=4), job.output_len)
    return rounded(rates([timing], 1, workload))
