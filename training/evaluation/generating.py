"""A text for each prompt of a file, to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from model.sampling_params import MAX_SEED, SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.evaluation.progress import OnProgress, silent
from training.evaluation.samples import GeneratedText
from training.generate import sample


def generate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[GeneratedText],
    params: SamplingParams,
    on_progress: OnProgress = silent,
) -> list[GeneratedText]:
    """The prompts with their texts, the first by `params.seed`, the next by the seed behind it, and so on.

    Raises PromptError for a prompt that fills the context, TokenizerError for one that cannot be expressed.
    """
    texts = []
    for number, prompt in enumerate(prompts):
        own = replace(params, seed=(params.seed + number) % (MAX_SEED + 1))
        result = sample(model, tokenizer, prompt.prompt or "", own)
        texts.append(replace(prompt, text=result.text, tokens=len(result.token_ids)))
        on_progress("generating texts", number + 1, len(prompts))
    return texts
