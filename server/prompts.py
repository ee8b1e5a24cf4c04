"""From a validated body to a Prompt that the engine can take, or the refusal. Knows a model, but no server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from model.chat_template import ChatTemplate
from model.errors import InvalidSamplingParamsError, TokenizerError
from model.grammar import Grammar
from model.sampling_params import SamplingParams
from model.text_output import TextDecoder
from model.tokenizer import Tokenizer
from server.error_handlers import from_sampling_error
from server.errors import InvalidRequestError
from server.grammar_checks import GrammarCheck
from server.grammars import native_grammar
from server.schemas.native import GenerateRequest
from server.schemas.sampling import SamplingFields
from server.seeds import draw_seed

LONG_TEXT = 2_000  # characters; what is longer is worked on off the event loop

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked request, ready for the engine. `echo` is text to put before the answer.

    `deadline` is seconds on the monotonic clock. `prompt_logprobs` asks for the log-probabilities of the prompt's
    tokens from the second on, each with that many alternatives; only with it may `params.max_tokens` be 0.
    """

    token_ids: list[int]
    params: SamplingParams
    n: int = 1
    stops: list[str] = field(default_factory=list)
    deadline: float | None = None
    echo: str = ""
    prompt_logprobs: int | None = None
    model: str = ""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a body is checked against. `output_width` is how many token ids the model's output distinguishes,
    `max_sequences` how many the server takes at once, running and waiting. `grammar_check` is its tokenizer's.
    `seed` is for a request that has none, where one had to be drawn to choose the model."""

    tokenizer: Tokenizer
    output_width: int
    max_model_len: int
    max_sequences: int
    chat_template: ChatTemplate | None = None
    grammar_check: GrammarCheck | None = None
    name: str = ""
    seed: int | None = None


async def native_prompt(body: GenerateRequest, model: ServedModel, arrival: float) -> Prompt:
    """The prompt of POST /generate; `arrival` is when it came, on the monotonic clock. Raises InvalidRequestError."""
    check_count(1, body.n, model)
    grammar = native_grammar(body.grammar)
    await check_grammar(grammar, "grammar", model)
    [token_ids] = await encode_prompts([body.prompt], model.tokenizer)
    return make_prompt(
        token_ids, body, body.max_tokens, model, grammar=grammar,
        arrival=arrival, logprobs=body.logprobs, echo=echo_text(body.prompt, model.tokenizer) if body.echo else "",
    )  # fmt: skip


async def check_grammar(grammar: Grammar | None, field: str, model: ServedModel) -> None:
    """Raises InvalidRequestError, naming the `field` of the body, for a grammar that the model cannot be held to."""
    if grammar is not None:
        assert model.grammar_check is not None, "a served model has one"
        await model.grammar_check.check(grammar, field)


async def off_loop(size: int, function: Callable[[], Result]) -> Result:
    """Call it, in a thread if what it works on has many characters."""
    return await asyncio.to_thread(function) if size > LONG_TEXT else function()


async def encode_prompts(prompts: Sequence[str | list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Each prompt's ids; an empty text starts from BOS or EOS. Raises InvalidRequestError."""
    num_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await off_loop(num_characters, lambda: [_encode(prompt, tokenizer) for prompt in prompts])


def _encode(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    try:
        token_ids = tokenizer.encode(prompt)
    except TokenizerError:
        message = "prompt holds characters that this model's tokenizer does not know"
        raise InvalidRequestError(message, param="prompt") from None
    if token_ids:
        return token_ids
    start = tokenizer.start_token_id
    if start is None:
        raise InvalidRequestError("prompt must not be empty: this model has no start token", param="prompt")
    return [start]


def make_prompt(
    token_ids: list[int], fields: SamplingFields, max_tokens: int | None, model: ServedModel, *,
    arrival: float, logprobs: int | None = None, echo: str = "", prompt_logprobs: int | None = None,
    prompt_field: str = "prompt", max_tokens_field: str = "max_tokens", grammar: Grammar | None = None,
) -> Prompt:  # fmt: skip
    """Raises InvalidRequestError for what the model cannot do; `max_tokens` None is the rest of its context.

    `prompt_field` and `max_tokens_field` are what the body calls its prompt and its limit; `grammar` has been checked.
    """
    _check_ids(token_ids, fields, model.output_width, prompt_field)
    names = prompt_field, max_tokens_field
    count = _max_tokens(max_tokens, len(token_ids), model.max_model_len, names)
    return Prompt(
        token_ids=token_ids,
        params=_sampling_params(fields, count, logprobs, grammar, model.seed),
        n=fields.n,
        stops=fields.stop_strings,
        deadline=None if fields.deadline_ms is None else arrival + fields.deadline_ms / 1000,
        echo=echo,
        prompt_logprobs=prompt_logprobs,
        model=model.name,
    )


def check_count(num_prompts: int, n: int, model: ServedModel) -> None:
    """Refused for good, where a full queue would be refused for now."""
    if n > model.max_sequences:
        message = f"n must not be above {model.max_sequences}, all that this server takes at once"
        raise InvalidRequestError(message, param="n")
    if num_prompts * n > model.max_sequences:
        message = (
            f"{num_prompts} prompts, each answered n={n} times, are more than the {model.max_sequences} answers"
            " that this server works on at once; send fewer"
        )
        raise InvalidRequestError(message, param="prompt")


def echo_text(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    """The prompt as the text that an answer repeats."""
    if isinstance(prompt, str):
        return prompt
    decoder = TextDecoder(tokenizer)
    return decoder.push(prompt) + decoder.finish()


def _check_ids(token_ids: list[int], fields: SamplingFields, width: int, prompt_field: str) -> None:
    """Every id must lie inside the model's output, which may be wider than the tokenizer's vocabulary."""
    for name, ids in (
        (prompt_field, token_ids),
        ("stop_token_ids", fields.stop_token_ids),
        ("logit_bias", list(fields.logit_bias)),
    ):
        if ids and max(ids) >= width:
            raise InvalidRequestError(f"{name} holds a token id that is not below {width}", param=name)
    if fields.top_k > width:
        raise InvalidRequestError(f"top_k must be an integer from 0 (off) to {width}", param="top_k")


def _max_tokens(asked: int | None, prompt_length: int, context: int, names: tuple[str, str]) -> int:
    prompt_field, max_tokens_field = names
    rest = context - prompt_length
    if asked == 0 and rest >= -1:  # the last token is predicted, and takes no place of its own
        return 0
    if rest < 1:
        message = f"the prompt's {prompt_length} tokens leave no room in the model's context of {context} tokens"
        raise InvalidRequestError(message, code="context_length_exceeded", param=prompt_field)
    if asked is not None and asked > rest:
        message = (
            f"the prompt's {prompt_length} tokens and {max_tokens_field} {asked} are more than the model's context of"
            f" {context} tokens; ask for at most {rest}, or null for the rest"
        )
        raise InvalidRequestError(message, code="context_length_exceeded", param=max_tokens_field)
    return rest if asked is None else asked


def _sampling_params(
    fields: SamplingFields, max_tokens: int, logprobs: int | None, grammar: Grammar | None, drawn_seed: int | None
) -> SamplingParams:
    seed = drawn_seed if fields.seed is None else fields.seed
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=fields.min_tokens,
            temperature=fields.temperature,
            top_k=fields.top_k,
            top_p=fields.top_p,
            min_p=fields.min_p,
            repetition_penalty=fields.repetition_penalty,
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            logit_bias=dict(fields.logit_bias),
            seed=draw_seed() if seed is None else seed,
            stop_token_ids=tuple(fields.stop_token_ids),
            ignore_eos=fields.ignore_eos,
            logprobs=logprobs,
            grammar=grammar,
        )
    except InvalidSamplingParamsError as error:
        raise from_sampling_error(error) from None
