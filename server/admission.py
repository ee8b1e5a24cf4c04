"""Whether a request is taken: everything that can be refused is refused here, before the first byte of an answer."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from server.caller import ANYONE, Caller
from server.engine.interface import EngineClient, EngineUnavailableError, QueueFullError
from server.engine.messages import CLASSIFICATION, GENERATION
from server.errors import (
    ApiError,
    BusyError,
    TaskNotServedError,
    engine_down_error,
    loading_error,
)
from server.generation import Generation
from server.history import HistoryEntry
from server.metrics import Metrics
from server.prompts import Prompt, ServedModel, native_prompt
from server.provenance import context_of, model_named
from server.schemas.native import GenerateRequest
from server.seeds import draw_seed
from server.services import Services

_OTHER_TASK = {
    GENERATION: "the model served here labels texts and writes none; send them to POST /classify",
    CLASSIFICATION: "the model served here writes text and labels none; serve a classifier for POST /classify",
}


async def admit(body: GenerateRequest, services: Services, caller: Caller = ANYONE) -> Generation:
    """Check the request against the model at hand and hand it to the engine. Raises ApiError."""
    arrival = time.monotonic()
    model = chosen_model(body.model, body.seed, services)
    return start_generation([await native_prompt(body, model, arrival)], services, caller)


def served_model(name: str | None, services: Services) -> ServedModel:
    """The model that a request names, the first one by default, once it can be asked for text. Raises ApiError."""
    known = services.model_name(name)
    refuse_unless_admitting(services)
    require_task(services, GENERATION)
    info, tools = services.ready_info, services.text_tools(known)
    width = model_named(info, known).config["vocab_size"]
    assert isinstance(width, int)
    return ServedModel(
        tokenizer=tools.tokenizer,
        output_width=width,
        max_model_len=context_of(info, known),
        max_sequences=info.max_num_seqs + services.settings.max_queued_requests,
        chat_template=tools.chat_template,
        grammar_check=services.grammars.of(tools.tokenizer),
        name=known,
    )


def chosen_model(name: str | None, seed: int | None, services: Services) -> ServedModel:
    """As `served_model`, for a request that draws tokens: where it names a split, its seed chooses the model."""
    split = None if name is None else services.splits.get(name)
    if split is None or name is None:
        return served_model(name, services)
    drawn = draw_seed() if seed is None else seed
    return replace(served_model(split.choose(name, drawn), services), seed=drawn)


def start_generation(prompts: list[Prompt], services: Services, caller: Caller = ANYONE) -> Generation:
    """Hand prompts, of one request and so of one deadline, to the engine, all of them or none. Raises ApiError."""
    refuse_unless_admitting(services)
    try:
        _check_deadline(prompts[0].deadline, caller.pool, services.metrics)
        tokenizer = services.text_tools(prompts[0].model).tokenizer
        generation = Generation(prompts, tokenizer, services.engine, services.lifecycle, services.metrics, caller.pool)
    except (QueueFullError, EngineUnavailableError, BusyError) as error:
        refused = _refusal(error, prompts, services, caller)
        services.metrics.count_rejection(refused.code)
        raise refused from None
    if services.shadows is not None and generation.model in services.shadows.pairs:
        generation.on_answer = services.shadows.offer
    if services.history is not None:
        block_size = services.ready_info.block_size
        services.history.add(HistoryEntry(caller, generation.model, block_size, generation))
    return generation


def refuse_unless_admitting(services: Services) -> None:
    error = services.lifecycle.admission_error()
    if error is not None:
        services.metrics.count_rejection(error.code)
        raise error


def require_task(services: Services, task: str) -> None:
    """Raises TaskNotServedError unless that is what the model is for."""
    if services.ready_info.models[0].task != task:
        raise TaskNotServedError(_OTHER_TASK[task])


def _refusal(error: Exception, prompts: list[Prompt], services: Services, caller: Caller) -> ApiError:
    hurried = prompts[0].deadline is not None
    if isinstance(error, QueueFullError) and hurried and _has_room(services.engine, prompts, caller.pool):
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


def _has_room(engine: EngineClient, prompts: list[Prompt], pool: int) -> bool:
    """Whether the queue would take the prompts if they were in no hurry."""
    num_tokens = sum(prompt.n * (len(prompt.token_ids) + prompt.params.max_tokens) for prompt in prompts)
    try:
        engine.check_admission(sum(prompt.n for prompt in prompts), num_tokens, pool)
    except (QueueFullError, EngineUnavailableError):
        return False
    return True


def _unreachable_error(wait: float) -> BusyError:
    message = "the request cannot start before its deadline_ms passes"
    return BusyError(message, math.ceil(wait), code="deadline_unreachable")


def _check_deadline(deadline: float | None, pool: int, metrics: Metrics) -> None:
    if deadline is None:
        return
    wait = metrics.expected_wait(pool)
    if time.monotonic() + wait >= deadline:
        raise _unreachable_error(wait)
