"""What `server.llm.LLM` takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InvalidSamplingParamsError, QuillError
from model.sampling_params import SamplingParams
from server.output import TokenLogprob


class LLMError(QuillError):
    """A use of LLM that is refused; one sentence says what to do."""


@dataclass(frozen=True, slots=True)
class GenerationParams(SamplingParams):
    """SamplingParams, and what is not the sampler's business: `n` choices, and texts that end one.

    Choice i of n draws with a seed derived from (seed, i). A stop string is not part of the text.
    """

    n: int = 1
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        if self.n < 1:
            raise InvalidSamplingParamsError("n", "must be at least 1")
        if not all(self.stops):
            raise InvalidSamplingParamsError("stop", "must not hold an empty string")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice, whole. `finish_reason` is stop, length, grammar where its grammar could not be followed, or error
    where the engine gave up for want of memory; `stop_reason` the string or id that ended it, None for EOS or a
    grammar."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    seed: int
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to one prompt. What is said of "the" text is choice 0's. `prompt` is None for a prompt of ids."""

    prompt: str | None
    prompt_token_ids: list[int]
    choices: list[Completion]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.choices[0].logprobs
