"""A text for each prompt of a file, to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from model.sampling_params import MAX_SEED, SamplingParams
from training.evaluation.progress import OnProgress, silent
from training.evaluation.samples import GeneratedText
from training.generate import Request, TextGenerator


def generate_texts(
    generator: TextGenerator,
    prompts: Sequence[GeneratedText],
    params: SamplingParams,
    *,
    controls: Sequence[str] = (),
    batch_size: int = 16,
    on_progress: OnProgress = silent,
) -> list[GeneratedText]:
    """The prompts with their texts, the first by `params.seed`, the next by the seed behind it, and so on.

    Raises PromptError for a prompt that fills the context, TokenizerError for one that cannot be expressed,
    ControlError for `controls` that the model does not know.
    """
    requests = [
        Request(
            generator.prompt_ids(prompt.prompt or "", controls),
            replace(params, seed=(params.seed + number) % (MAX_SEED + 1)),
        )
        for number, prompt in enumerate(prompts)
    ]
    texts = list(prompts)
    done = 0
    for delta in generator.stream_requests(requests, batch_size=batch_size):
        if delta.sample is not None:
            own, done = delta.sample, done + 1
            texts[delta.index] = replace(prompts[delta.index], text=own.text, tokens=len(own.token_ids))
            on_progress("generating texts", done, len(prompts))
    return texts
