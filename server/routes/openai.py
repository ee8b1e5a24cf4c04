"""OpenAI's routes: completions, chat completions and the list of models."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.admission import chosen_model, start_generation
from server.caller import caller_of
from server.engine.messages import EngineInfo
from server.error_handlers import request_id
from server.errors import UnknownModelError
from server.openai_output import AnswerSource, ChatFormat, CompletionFormat
from server.openai_prompts import chat_prompt, completion_prompts
from server.openapi import request_body
from server.prompts import Prompt, ServedModel
from server.provenance import context_of
from server.request_body import read_body
from server.routes.ops import json_response
from server.schemas.openai import ChatCompletionRequest, CompletionRequest, OpenAIFields
from server.services import Services
from server.streaming import StreamedGeneration

router = APIRouter()
_STARTED = int(time.time())
_COMPLETION_EXAMPLES = {
    "a text": {"value": {"prompt": "To be, or not to be", "max_tokens": 64, "temperature": 0.8}},
    "a stream": {
        "value": {"prompt": "ROMEO:", "max_tokens": 64, "stream": True, "stream_options": {"include_usage": True}}
    },
    "several prompts": {"value": {"prompt": ["ROMEO:", "JULIET:"], "max_tokens": 32, "n": 2, "seed": 7}},
}
_CHAT_EXAMPLES = {
    "a question": {"value": {"messages": [{"role": "user", "content": "Who wrote Hamlet?"}], "max_tokens": 64}},
    "a stream": {"value": {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}},
}


@router.post(
    "/v1/completions",
    openapi_extra=request_body(CompletionRequest, examples=_COMPLETION_EXAMPLES),
    summary="Continue texts, in OpenAI's shape",
)
async def completions(request: Request) -> Response:
    services: Services = request.app.state.services
    body = await read_body(request, CompletionRequest)
    arrival = time.monotonic()
    model = chosen_model(body.model, body.seed, services)
    prompts = await completion_prompts(body, model, arrival)
    return await _answer(request, body, model, prompts, "cmpl-", CompletionFormat)


@router.post(
    "/v1/chat/completions",
    openapi_extra=request_body(ChatCompletionRequest, examples=_CHAT_EXAMPLES),
    summary="Answer a conversation, in OpenAI's shape",
)
async def chat_completions(request: Request) -> Response:
    services: Services = request.app.state.services
    body = await read_body(request, ChatCompletionRequest)
    arrival = time.monotonic()
    model = chosen_model(body.model, body.seed, services)
    prompt = await chat_prompt(body, model, arrival)
    return await _answer(request, body, model, [prompt], "chatcmpl-", ChatFormat)


async def _answer(
    request: Request, body: OpenAIFields, model: ServedModel, prompts: list[Prompt], prefix: str,
    make_format: type[CompletionFormat] | type[ChatFormat],
) -> Response:  # fmt: skip
    services: Services = request.app.state.services
    generation = start_generation(prompts, services, caller_of(request.scope))
    source = AnswerSource(
        id=prefix + request_id(request.scope).removeprefix("req-"),
        created=int(time.time()),
        model=model.name,
        provenance=generation.provenance,
    )
    answer_format = make_format(source, generation, model.tokenizer, body)
    if body.stream:
        return StreamedGeneration(generation, answer_format, services.heartbeat)
    try:
        choices = await generation.collect(request.receive)
        return Response(answer_format.answer(choices, generation.usage), media_type="application/json")
    finally:
        generation.close()


@router.get("/v1/models", summary="The served models, in OpenAI's shape")
async def list_models(request: Request) -> Response:
    services: Services = request.app.state.services
    return json_response({"object": "list", "data": [_describe(name, services) for name in _names(services)]})


@router.get("/v1/models/{model:path}", summary="One served model, in OpenAI's shape")
async def retrieve_model(model: str, request: Request) -> Response:
    services: Services = request.app.state.services
    if model not in _names(services):
        raise UnknownModelError
    return json_response(_describe(model, services))


def _describe(name: str, services: Services) -> dict[str, object]:
    info = services.engine.info
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "quill",
        "max_model_len": None if info is None else _context(name, info, services),
    }


def _names(services: Services) -> list[str]:
    return [*services.models, *services.splits]


def _context(name: str, info: EngineInfo, services: Services) -> int:
    """Of a split, what all its models can take."""
    split = services.splits.get(name)
    return min(context_of(info, model) for model in ([name] if split is None else split.models))
