"""Text from a checkpoint, or from a model in training.

    from model.sampling_params import SamplingParams
    from training.generate import TextGenerator

    generator = TextGenerator.load(Path("runs/shakespeare/checkpoints/best"))
    [[sample]] = generator.generate(["ROMEO:"], SamplingParams(max_tokens=100, temperature=0.8))
    print(sample.text)
    for delta in generator.stream("JULIET:", SamplingParams(max_tokens=100), stop=["\\n\\n"]):
        print(delta.text, end="", flush=True)

Below it lie `model.generate.generate`, one sequence of token ids, and `model.generate_batch`, many at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.beam_search import BeamParams, beam_search
from model.chat_template import ChatTemplate, load_chat_template, render_chat
from model.checkpoint import load_model
from model.controls import Controls, read_controls
from model.generate import CausalModel, stream_generate
from model.generate_batch import BatchGenerator
from model.packed_model import pack_model
from model.sampling_params import MAX_SEED, SamplingParams
from model.tokenizer import Tokenizer
from training.build import resolve_device
from training.errors import RecipeError
from training.generation.prompts import prompt_ids
from training.generation.sample import Delta, Sample, TextBuilder

__all__ = ["Delta", "Request", "Sample", "TextGenerator", "generate_from_checkpoint", "prompt_ids", "sample"]


@dataclass(frozen=True, slots=True)
class Request:
    """One text to generate: the ids to continue, how, and the strings that end it."""

    token_ids: Sequence[int]
    params: SamplingParams
    stop: Sequence[str] = ()


class TextGenerator:
    """A model with its tokenizer and what else its checkpoint has: a chat template, control tokens.

    A request's text depends on its ids, parameters and seed. On the CPU that holds to the bit whatever is generated
    beside it; on a GPU sums of other sizes round differently, and a near tie may fall the other way.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None = None,
        controls: Controls | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.controls = controls or Controls()

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> TextGenerator:
        """A checkpoint folder. Raises RecipeError, CheckpointError, ConfigError or TokenizerError."""
        place = resolve_device(device)
        model = load_model(folder, dtype=dtype, device=place)
        return cls(pack_model(model), Tokenizer.load(folder), load_chat_template(folder), read_controls(folder))

    @property
    def max_seq_len(self) -> int:
        return self.model.config.max_seq_len

    def prompt_ids(self, text: str, controls: Sequence[str] = ()) -> list[int]:
        """The ids of a text to continue, behind the tokens of `name=value` controls.

        Raises ControlError for controls that the model does not know, TokenizerError for text that it cannot express.
        """
        return prompt_ids(self.tokenizer, text, self.controls.prefix_ids(self.tokenizer, controls))

    def chat_ids(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """The ids of a conversation up to the start of the answer, by the checkpoint's template.

        Raises RecipeError without a template, TokenizerError for messages that it refuses.
        """
        text = render_chat(self.require_template(), messages, forbidden=self.tokenizer.special_tokens)
        return self.tokenizer.encode_template(text)

    def require_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise RecipeError("--chat needs a chat template, which this checkpoint has not; leave it out")
        return self.chat_template

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        controls: Sequence[str] = (),
        batch_size: int = 32,
    ) -> list[list[Sample]]:
        """`num_samples` texts for each prompt, with the seeds `params.seed`, `params.seed` + 1 …

        `batch_size` texts are generated at a time. Raises PromptError for a prompt that leaves no room in the
        context, TokenizerError for one that the vocabulary cannot express.
        """
        requests = [
            Request(ids, each, stop)
            for ids in [self.prompt_ids(prompt, controls) for prompt in prompts]
            for each in seeded(params, num_samples)
        ]  # fmt: skip
        samples = self.generate_requests(requests, batch_size=batch_size)
        return [samples[start : start + num_samples] for start in range(0, len(samples), num_samples)]

    def generate_requests(self, requests: Sequence[Request], *, batch_size: int = 32) -> list[Sample]:
        """The sample of each request, in their order."""
        ended = [delta for delta in self.stream_requests(requests, batch_size=batch_size) if delta.sample is not None]
        return [delta.sample for delta in sorted(ended, key=lambda delta: delta.index) if delta.sample is not None]

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams, *, stop: Sequence[str] = ()
    ) -> Iterator[Delta]:
        """The text of one prompt, given as text or ids, as it comes."""
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        return self.stream_requests([Request(ids, params, stop)])

    def stream_requests(self, requests: Sequence[Request], *, batch_size: int = 32) -> Iterator[Delta]:
        """Deltas of all requests as their tokens come, `batch_size` requests at a time.

        What is wrong with a request is raised here, before anything is generated.
        """
        batch = BatchGenerator(
            self.model,
            [request.token_ids for request in requests],
            [request.params for request in requests],
            max_rows=batch_size,
            valid_vocab_size=self.tokenizer.vocab_size,
        )
        return self._deltas(batch, [self._builder(request) for request in requests])

    def _builder(self, request: Request) -> TextBuilder:
        return TextBuilder(
            self.tokenizer,
            seed=request.params.seed,
            stop=request.stop,
            min_tokens=request.params.min_tokens,
            eos_token_ids=self.model.config.eos_token_ids,
        )

    def _deltas(self, batch: BatchGenerator, builders: Sequence[TextBuilder]) -> Iterator[Delta]:
        while not batch.is_done:
            for entry in batch.step():
                builder = builders[entry.index]
                text = builder.push(entry.token)
                if builder.sample is not None:
                    batch.stop(entry.index)  # a stop string ends what the tokens did not
                yield Delta(entry.index, text, entry.token.token_id, builder.sample)

    def beam_search(self, token_ids: Sequence[int], params: BeamParams) -> list[Sample]:
        """The best continuations as a whole, best first."""
        found = beam_search(self.model, token_ids, params, valid_vocab_size=self.tokenizer.vocab_size)
        samples = []
        for hypothesis in found:
            ids, reason = hypothesis.token_ids, hypothesis.finish_reason
            text = self.tokenizer.decode(ids[:-1] if reason == "stop" else ids)
            samples.append(Sample(text, ids, reason, seed=None, score=hypothesis.score))
        return samples


def seeded(params: SamplingParams, num_samples: int) -> list[SamplingParams]:
    """The parameters of several samples of one prompt: their seeds follow one another."""
    return [replace(params, seed=(params.seed + number) % (MAX_SEED + 1)) for number in range(num_samples)]


def sample(model: CausalModel, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Sample:
    """At most `params.max_tokens` tokens, fewer where the context ends. Raises PromptError for too long a prompt."""
    builder = TextBuilder(tokenizer, seed=params.seed, eos_token_ids=model.config.eos_token_ids)
    for token in stream_generate(
        model, prompt_ids(tokenizer, prompt), params, valid_vocab_size=tokenizer.vocab_size
    ):  # fmt: skip
        builder.push(token)
    assert builder.sample is not None, "the last token has a finish_reason"
    return builder.sample


def generate_from_checkpoint(
    folder: Path, prompt: str, params: Sequence[SamplingParams], *, device: str, dtype: torch.dtype
) -> list[Sample]:
    """One sample for each of `params`. Raises RecipeError, PromptError, CheckpointError or TokenizerError."""
    generator = TextGenerator.load(folder, device=device, dtype=dtype)
    ids = generator.prompt_ids(prompt)
    return generator.generate_requests([Request(ids, each) for each in params])
