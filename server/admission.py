"""From a validated body to a prompt that the engine can take; everything that can be refused is refused here,
before the first byte of an answer."""

from __future__ import annotations

import asyncio
import math
import secrets
import time

from model.errors import InvalidSamplingParamsError, TokenizerError
from model.sampling_params import SamplingParams
from model.text_output import TextDecoder
from model.tokenizer import Tokenizer
from server.engine.interface import EngineClient, EngineUnavailableError, QueueFullError
from server.engine.messages import CLASSIFICATION, GENERATION, EngineInfo
from server.error_handlers import from_sampling_error
from server.errors import (
    ApiError,
    BusyError,
    InvalidRequestError,
    TaskNotServedError,
    UnknownModelError,
    engine_down_error,
    loading_error,
)
from server.generation import SEED_BITS, Generation, Prompt
from server.metrics import Metrics
from server.schemas.native import GenerateRequest
from server.services import Services

LONG_TEXT = 2_000  # characters; longer texts are tokenised off the event loop
_OTHER_TASK = {
    GENERATION: "the model served here labels texts and writes none; send them to POST /classify",
    CLASSIFICATION: "the model served here writes text and labels none; serve a classifier for POST /classify",
}


async def admit(body: GenerateRequest, services: Services) -> Generation:
    """Check the request against the model at hand and hand it to the engine. Raises ApiError."""
    arrival = time.monotonic()
    if body.model is not None and body.model not in services.models:
        raise UnknownModelError
    refuse_unless_admitting(services)
    require_task(services, GENERATION)
    prompt = await _prompt(body, services, arrival)
    refuse_unless_admitting(services)
    try:
        _check_deadline(prompt.deadline, services.metrics)
        assert services.tokenizer is not None, "admission needs a loaded tokenizer"
        return Generation(prompt, services.tokenizer, services.engine, services.lifecycle, services.metrics)
    except (QueueFullError, EngineUnavailableError, BusyError) as error:
        refusal = _refusal(error, prompt, services)
        services.metrics.count_rejection(refusal.code)
        raise refusal from None


def refuse_unless_admitting(services: Services) -> None:
    error = services.lifecycle.admission_error()
    if error is not None:
        services.metrics.count_rejection(error.code)
        raise error


def require_task(services: Services, task: str) -> None:
    """Raises TaskNotServedError unless that is what the model is for."""
    if services.ready_info.models[0].task != task:
        raise TaskNotServedError(_OTHER_TASK[task])


def _refusal(error: Exception, prompt: Prompt, services: Services) -> ApiError:
    if isinstance(error, QueueFullError) and prompt.deadline is not None and _has_room(services.engine, prompt.n):
        return _unreachable_error(error.retry_after)
    return refusal(error, services)


def refusal(error: Exception, services: Services) -> ApiError:
    """What a client is told of the engine's refusal."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return BusyError("the request queue is full; try again later", error.retry_after)
    assert isinstance(error, EngineUnavailableError)
    make = loading_error if services.engine.state == "loading" else engine_down_error
    return make(error.retry_after)


def _has_room(engine: EngineClient, num_sequences: int) -> bool:
    """Whether the queue would take as many sequences if they were in no hurry."""
    try:
        engine.check_admission(num_sequences)
    except (QueueFullError, EngineUnavailableError):
        return False
    return True


def _unreachable_error(wait: float) -> BusyError:
    message = "the request cannot start before its deadline_ms passes"
    return BusyError(message, math.ceil(wait), code="deadline_unreachable")


def _check_deadline(deadline: float | None, metrics: Metrics) -> None:
    if deadline is None:
        return
    wait = metrics.expected_wait()
    if time.monotonic() + wait >= deadline:
        raise _unreachable_error(wait)


async def _prompt(body: GenerateRequest, services: Services, arrival: float) -> Prompt:
    tokenizer, info = services.tokenizer, services.ready_info
    assert tokenizer is not None, "admission needs a loaded tokenizer"
    width = output_width(info)
    token_ids = await _token_ids(body.prompt, tokenizer)
    _check_ids(body, token_ids, width)
    _check_n(body.n, info.max_num_seqs + services.settings.max_queued_requests)
    max_tokens = _max_tokens(body.max_tokens, len(token_ids), info.max_model_len)
    return Prompt(
        token_ids=token_ids,
        params=_sampling_params(body, max_tokens),
        n=body.n,
        stops=body.stop_strings,
        deadline=None if body.deadline_ms is None else arrival + body.deadline_ms / 1000,
        echo=_echo(body.prompt, tokenizer) if body.echo else "",
    )


def output_width(info: EngineInfo) -> int:
    """How many token ids the model's output distinguishes."""
    width = info.models[0].config["vocab_size"]
    assert isinstance(width, int)
    return width


async def _token_ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    try:
        if len(prompt) > LONG_TEXT:
            token_ids = await asyncio.to_thread(tokenizer.encode, prompt)
        else:
            token_ids = tokenizer.encode(prompt)
    except TokenizerError:
        message = "prompt holds characters that this model's tokenizer does not know"
        raise InvalidRequestError(message, param="prompt") from None
    if token_ids:
        return token_ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InvalidRequestError("prompt must not be empty: this model has no start token", param="prompt")
    return [start]


def _check_ids(body: GenerateRequest, prompt_ids: list[int], width: int) -> None:
    """Every id must lie inside the model's output, which may be wider than the tokenizer's vocabulary."""
    for name, ids in (
        ("prompt", prompt_ids),
        ("stop_token_ids", body.stop_token_ids),
        ("logit_bias", list(body.logit_bias)),
    ):
        if ids and max(ids) >= width:
            raise InvalidRequestError(f"{name} holds a token id that is not below {width}", param=name)
    if body.top_k > width:
        raise InvalidRequestError(f"top_k must be an integer from 0 (off) to {width}", param="top_k")


def _check_n(n: int, capacity: int) -> None:
    """Refused for good, where a full queue would be refused for now."""
    if n > capacity:
        raise InvalidRequestError(f"n must not be above {capacity}, all that this server takes at once", param="n")


def _max_tokens(asked: int | None, prompt_length: int, context: int) -> int:
    rest = context - prompt_length
    if rest < 1:
        message = f"the prompt's {prompt_length} tokens leave no room in the model's context of {context} tokens"
        raise InvalidRequestError(message, code="context_length_exceeded", param="prompt")
    if asked is not None and asked > rest:
        message = (
            f"the prompt's {prompt_length} tokens and max_tokens {asked} are more than the model's context of"
            f" {context} tokens; ask for at most {rest}, or null for the rest"
        )
        raise InvalidRequestError(message, code="context_length_exceeded", param="max_tokens")
    return rest if asked is None else asked


def _sampling_params(body: GenerateRequest, max_tokens: int) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=dict(body.logit_bias),
            seed=secrets.randbits(SEED_BITS) if body.seed is None else body.seed,
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            logprobs=body.logprobs,
        )
    except InvalidSamplingParamsError as error:
        raise from_sampling_error(error) from None


def _echo(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    decoder = TextDecoder(tokenizer)
    return decoder.push(prompt) + decoder.finish()
