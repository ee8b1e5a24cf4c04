"""How long a model takes, over a grid of batch sizes and lengths.

    python -m training latency gpt2 --batch-sizes 1,8 --lengths 128,512

Prefill: one pass over `length` tokens of each sequence that fills the KV cache, and the logits of the last token.
Decode: one token more for each sequence, a pass a token over the cache, the likeliest token next. Each figure is the
median over repeats that are waited for, after untimed ones. What a pass costs does not depend on what the tokens say,
so they are random, and so are a preset's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from model.checkpoint import load_model
from model.dense_cache import DenseKVCache
from model.generate import CausalModel
from model.packed_model import pack_model
from model.presets import PRESET_ALIASES, PRESETS, create_config
from model.transformer import Transformer
from training.build import resolve_device
from training.errors import RecipeError
from training.evaluation.progress import OnProgress, silent

DEFAULT_LENGTHS = (128, 512)


@dataclass(frozen=True, slots=True)
class LatencyPlan:
    """`lengths` are of prompts, in tokens; `new_tokens` are decoded behind each."""

    batch_sizes: Sequence[int]
    lengths: Sequence[int]
    new_tokens: int
    warmup: int = 1
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class LatencyCell:
    """One batch size and length. Tokens per second are of all sequences together.

    `cache_bytes` is the KV cache for `length + new_tokens` tokens of each sequence; `peak_bytes` the most memory that
    tensors took on the GPU at once, weights included, None on a CPU.
    """

    batch_size: int
    length: int
    prefill_ms: float
    prefill_tokens_per_second: float
    decode_ms_per_token: float
    decode_tokens_per_second: float
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model in eval mode, on a CPU with its products laid out for it; its sizes are those before that."""

    model: CausalModel
    num_parameters: int
    weights_bytes: int


def open_model(name: str, *, device: str, dtype: torch.dtype) -> OpenedModel:
    """A checkpoint folder's model, that of an owner/name on the Hub, or a preset's with random weights, as `generate`
    and the server run it.

    Raises RecipeError for a name that is neither, ConfigError or CheckpointError for a folder that cannot be loaded.
    """
    model = _load(name, resolve_device(device), dtype)
    parameters = list(model.parameters())
    sizes = sum(each.numel() for each in parameters), sum(each.nbytes for each in parameters)
    return OpenedModel(pack_model(model), *sizes)


def _load(name: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    if Path(name).is_dir() or "/" in name:  # a bare name means a preset
        return load_model(name, dtype=dtype, device=device)
    if name not in PRESETS and name not in PRESET_ALIASES:
        known = ", ".join([*PRESETS, *PRESET_ALIASES])
        raise RecipeError(f"{name} is neither a checkpoint folder nor a preset; presets are {known}")
    model = Transformer(create_config(name))
    model.init_weights(0)
    return model.to(device=device, dtype=dtype).eval()


def fitting_lengths(lengths: Sequence[int] | None, new_tokens: int, context: int) -> Sequence[int]:
    """The lengths asked for, or those of the usual ones that leave room for `new_tokens`, or the longest that does.

    Raises RecipeError for what does not fit the model's context.
    """
    if new_tokens >= context:
        raise RecipeError(f"--new-tokens is {new_tokens} but the model's context is {context}; ask for fewer")
    room = context - new_tokens
    if lengths is None:
        return [length for length in DEFAULT_LENGTHS if length <= room] or [room]
    for length in lengths:
        if length > room:
            raise RecipeError(
                f"--lengths has {length}, which with {new_tokens} new tokens exceeds the model's context of {context}"
            )
    return lengths


@torch.inference_mode()
def measure_latency(model: CausalModel, plan: LatencyPlan, on_progress: OnProgress = silent) -> list[LatencyCell]:
    """A cell for each batch size and length, in that order. Raises RecipeError where the memory does not suffice."""
    shapes = [(batch_size, length) for batch_size in plan.batch_sizes for length in plan.lengths]
    cells = []
    for number, (batch_size, length) in enumerate(shapes, start=1):
        try:
            cells.append(_measure(model, plan, batch_size, length))
        except torch.OutOfMemoryError:
            raise RecipeError(
                f"{batch_size} sequences of {length} tokens do not fit the memory of {model.device}; "
                "lower --batch-sizes or --lengths"
            ) from None
        on_progress("measuring", number, len(shapes))
    return cells


def median_seconds(run: Callable[[], object], device: torch.device, *, warmup: int, repeats: int) -> float:
    """Median over `repeats` calls, each waited for, after `warmup` untimed ones."""
    seconds = []
    for _ in range(warmup + repeats):
        _synchronize(device)
        start = perf_counter()
        run()
        _synchronize(device)
        seconds.append(perf_counter() - start)
    return median(seconds[warmup:])


class Passes:
    """Prefill and decode of one batch; each can be called again and begins where it began before."""

    def __init__(self, model: CausalModel, batch_size: int, length: int, new_tokens: int) -> None:
        self.model, self.length, self.new_tokens = model, length, new_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)
        self.ids = ids.to(model.device)
        self.cache = model.new_dense_cache(batch_size, length + new_tokens)
        self.next_ids = self.ids[:, -1:]

    def prefill(self) -> Tensor:
        """The first token behind each sequence, [B, 1]."""
        self.cache.length = 0
        self.next_ids = self._pass(self.ids)
        return self.next_ids

    def decode(self) -> list[Tensor]:
        """The `new_tokens` tokens behind the first ones, each [B, 1]."""
        self.cache.length = self.length
        tokens = [self.next_ids]
        for _ in range(self.new_tokens):
            tokens.append(self._pass(tokens[-1]))
        return tokens[1:]

    def _pass(self, ids: Tensor) -> Tensor:
        """The likeliest next tokens, [B, 1]."""
        return self.model.compute_logits(self.model(ids, self.cache)[:, -1:]).argmax(-1)


def _measure(model: CausalModel, plan: LatencyPlan, batch_size: int, length: int) -> LatencyCell:
    device = model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    passes = Passes(model, batch_size, length, plan.new_tokens)
    prefill = median_seconds(passes.prefill, device, warmup=plan.warmup, repeats=plan.repeats)
    decode = median_seconds(passes.decode, device, warmup=plan.warmup, repeats=plan.repeats)
    return LatencyCell(
        batch_size=batch_size,
        length=length,
        prefill_ms=1e3 * prefill,
        prefill_tokens_per_second=batch_size * length / prefill,
        decode_ms_per_token=1e3 * decode / plan.new_tokens,
        decode_tokens_per_second=batch_size * plan.new_tokens / decode,
        cache_bytes=_cache_bytes(passes.cache),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _cache_bytes(cache: DenseKVCache) -> int:
    return sum(tensor.nbytes for tensor in (*cache.cache.keys, *cache.cache.values))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
