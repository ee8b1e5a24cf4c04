"""Text from a checkpoint, or from a model in training, by the model package's plain `generate()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.checkpoint import load_model
from model.generate import generate
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.build import resolve_device
from training.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Sample:
    """What followed a prompt. `finish_reason` is `stop` at the end-of-text token, otherwise `length`."""

    text: str
    token_ids: list[int]
    finish_reason: str
    seed: int


def sample(model: Transformer, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Sample:
    """At most `params.max_tokens` tokens, fewer where the context ends. Raises PromptError for too long a prompt."""
    result = generate(model, prompt_ids(tokenizer, prompt), params, valid_vocab_size=tokenizer.vocab_size)
    return Sample(tokenizer.decode(result.token_ids), result.token_ids, result.finish_reason, params.seed)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """An empty prompt starts from the end-of-text token."""
    ids = tokenizer.encode(prompt)
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise RecipeError("--prompt is empty and the tokenizer has no end-of-text token to start from")
        ids = [start]
    return ids


def generate_from_checkpoint(
    folder: Path, prompt: str, params: Sequence[SamplingParams], *, device: str, dtype: torch.dtype
) -> list[Sample]:
    """One sample for each of `params`. Raises RecipeError, PromptError, CheckpointError or TokenizerError."""
    model = load_model(folder, dtype=dtype, device=resolve_device(device))
    tokenizer = Tokenizer.load(folder)
    return [sample(model, tokenizer, prompt, each) for each in params]
