"""POST /generate: text as one JSON answer or as a stream of events."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.admission import admit
from server.engine.messages import EngineInfo
from server.error_handlers import log_fault, request_id
from server.errors import ApiError, ClientGoneError, error_body
from server.generation import Generation
from server.output import ChoiceDelta, TokenLogprob, Usage
from server.request_body import read_body
from server.schemas.native import GenerateRequest
from server.services import Services
from server.sse import DONE, EventSender, data_event, error_event

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


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": GenerateRequest.model_json_schema()}},
    }
}


@router.post("/generate", openapi_extra=_BODY, summary="Generate text")
async def generate(request: Request) -> Response:
    services: Services = request.app.state.services
    body = await read_body(request, GenerateRequest)
    generation = await admit(body, services)
    model = body.model or services.models[0]
    if body.stream:
        return StreamedGeneration(generation, model, services)
    try:
        return await _whole_answer(generation, request, model, services)
    finally:
        generation.close()


def generation_id(scope: Scope) -> str:
    return "gen-" + request_id(scope).removeprefix("req-")


def provenance(info: EngineInfo) -> dict[str, object]:
    """Which weights answered: their digest, and the step and run that trained them where known."""
    model = info.models[0]
    known = model.provenance
    return {"weights": model.weights_digest, "step": known.get("step"), "run": known.get("run")}


async def _whole_answer(generation: Generation, request: Request, model: str, services: Services) -> Response:
    deltas: list[list[ChoiceDelta]] = [[] for _ in generation.choices]

    async def collect(delta: ChoiceDelta) -> None:
        deltas[delta.index].append(delta)

    await generation.run(request.receive, collect)
    answer = Answer(
        id=generation_id(request.scope),
        model=model,
        created=int(time.time()),
        choices=[join_deltas(parts, seed) for parts, seed in zip(deltas, generation.seeds, strict=True)],
        usage=generation.usage,
        provenance=provenance(services.ready_info),
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


def join_deltas(deltas: list[ChoiceDelta], seed: int) -> Choice:
    """One choice's deltas as a whole."""
    last = deltas[-1]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    return Choice(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        seed=seed,
        logprobs=None if all(delta.logprobs is None for delta in deltas) else logprobs,
    )


class StreamedGeneration(Response):
    """The answer as events. The request was admitted before this exists, so its status is always 200."""

    def __init__(self, generation: Generation, model: str, services: Services) -> None:
        self.background: BackgroundTask | None = None
        self.status_code = 200
        self._generation = generation
        self._model = model
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = EventSender(scope, send)
        self._services.heartbeat.add(sender)
        try:
            await sender.start()
            await self._stream(scope, receive, sender)
        except ClientGoneError:
            return
        except ApiError as error:
            await sender.end(error_event(error_body(error, request_id(scope))))
        except Exception as error:
            await sender.end(error_event(error_body(log_fault(error, scope), request_id(scope))))
        finally:
            self._generation.close()
            self._services.heartbeat.remove(sender)

    async def _stream(self, scope: Scope, receive: Receive, sender: EventSender) -> None:
        event_id = generation_id(scope)

        async def emit(delta: ChoiceDelta) -> None:
            await sender.send(data_event(Event(event_id, [delta])))

        await self._generation.run(receive, emit)
        last = LastEvent(
            id=event_id,
            model=self._model,
            created=int(time.time()),
            choices=[],
            usage=self._generation.usage,
            provenance=provenance(self._services.ready_info),
            seeds=self._generation.seeds,
        )
        await sender.end(data_event(last) + DONE)
