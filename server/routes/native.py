"""POST /generate: text as one JSON answer or as a stream of events."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

from server.admission import admit
from server.caller import caller_of
from server.error_handlers import request_id
from server.errors import ApiError, error_body
from server.generation import Generation
from server.openapi import request_body
from server.output import ChoiceDelta, TokenLogprob, Usage
from server.request_body import parse_body, read_bytes
from server.routes.tgi import answer_tgi
from server.schemas.native import GenerateRequest
from server.services import Services
from server.sse import DONE, data_event, error_event
from server.streaming import StreamedGeneration
from server.tgi_request import is_tgi_body

router = APIRouter()


class Choice(msgspec.Struct):
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    seed: int
    logprobs: list[TokenLogprob] | None


class Answer(msgspec.Struct):
    id: str
    model: str
    created: int
    choices: list[Choice]
    usage: Usage
    provenance: dict[str, object]


class Event(msgspec.Struct):
    id: str
    choices: list[ChoiceDelta]


class LastEvent(msgspec.Struct):
    id: str
    model: str
    created: int
    choices: list[object]
    usage: Usage
    provenance: dict[str, object]
    seeds: list[int]


_EXAMPLES: dict[str, Any] = {
    "a text": {"value": {"prompt": "To be, or not to be", "max_tokens": 64, "temperature": 0.8}},
    "a stream": {"value": {"prompt": "ROMEO:", "max_tokens": 200, "stop": ["\n\n"], "stream": True}},
    "three answers with log-probabilities": {
        "value": {"prompt": "ROMEO:", "max_tokens": 16, "n": 3, "logprobs": 2, "top_p": 0.9, "seed": 7}
    },
}


@router.post("/generate", openapi_extra=request_body(GenerateRequest, examples=_EXAMPLES), summary="Generate text")
async def generate(request: Request) -> Response:
    raw = await read_bytes(request)
    if is_tgi_body(raw):
        return await answer_tgi(request)
    services: Services = request.app.state.services
    body = parse_body(raw, GenerateRequest)
    generation = await admit(body, services, caller_of(request.scope))
    if body.stream:
        events = NativeEvents(generation_id(request.scope), generation.model, generation.provenance)
        return StreamedGeneration(generation, events, services.heartbeat)
    try:
        return await _whole_answer(generation, request)
    finally:
        generation.close()


def generation_id(scope: Scope) -> str:
    return "gen-" + request_id(scope).removeprefix("req-")


async def _whole_answer(generation: Generation, request: Request) -> Response:
    choices = await generation.collect(request.receive)
    answer = Answer(
        id=generation_id(request.scope),
        model=generation.model,
        created=int(time.time()),
        choices=[_choice(whole, seed) for whole, seed in zip(choices, generation.seeds, strict=True)],
        usage=generation.usage,
        provenance=generation.provenance,
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _choice(whole: ChoiceDelta, seed: int) -> Choice:
    return Choice(
        index=whole.index,
        text=whole.text,
        token_ids=whole.token_ids,
        finish_reason=whole.finish_reason,
        stop_reason=whole.stop_reason,
        seed=seed,
        logprobs=whole.logprobs,
    )


class NativeEvents:
    """A delta per event; the last one before [DONE] carries the usage and the seeds."""

    def __init__(self, event_id: str, model: str, provenance: dict[str, object]) -> None:
        self._id = event_id
        self._model = model
        self._provenance = provenance

    def event(self, delta: ChoiceDelta) -> bytes:
        return data_event(Event(self._id, [delta]))

    def end(self, generation: Generation) -> bytes:
        last = LastEvent(
            id=self._id,
            model=self._model,
            created=int(time.time()),
            choices=[],
            usage=generation.usage,
            provenance=self._provenance,
            seeds=generation.seeds,
        )
        return data_event(last) + DONE

    def error(self, error: ApiError, request_id: str) -> bytes:
        return error_event(error_body(error, request_id))
