"""POST / and POST /generate_stream of Text Generation Inference, and its body on POST /generate."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Request
from msgspec import UNSET
from starlette.responses import Response

from server.caller import caller_of
from server.errors import ApiError
from server.generation import Generation
from server.openapi import request_body
from server.output import ChoiceDelta
from server.request_body import parse_body, read_bytes
from server.schemas.tgi import TgiRequest
from server.services import Services
from server.sse import data_event
from server.streaming import StreamedGeneration
from server.tgi_errors import GenerationFailedError, in_tgi_shape, tgi_error_event
from server.tgi_output import (
    Answer,
    BestOfSequence,
    Details,
    StreamDetails,
    StreamEvent,
    TokenReader,
    mean_logprob,
    prefill_tokens,
)
from server.tgi_request import TgiGeneration, admit_tgi

router = APIRouter()
_EXAMPLES = {
    "a text": {"value": {"inputs": "ROMEO:", "parameters": {"max_new_tokens": 40, "temperature": 0.8, "seed": 7}}},
    "with details": {"value": {"inputs": "ROMEO:", "parameters": {"max_new_tokens": 8, "details": True}}},
}


@router.post(
    "/",
    openapi_extra=request_body(TgiRequest, examples=_EXAMPLES),
    summary="TGI: text as a list of one answer, or as a stream",
)
async def compatible(request: Request) -> Response:
    """TGI's route for clients of the Hub's inference API, who get the prompt back with the text unless they say no."""
    return await in_tgi_shape(_respond(request, full_text=True, in_list=True), request.scope)


@router.post(
    "/generate_stream", openapi_extra=request_body(TgiRequest, examples=_EXAMPLES), summary="TGI: text as a stream"
)
async def generate_stream(request: Request) -> Response:
    return await in_tgi_shape(_respond(request, streamed=True), request.scope)


async def answer_tgi(request: Request) -> Response:
    """POST /generate with TGI's body."""
    return await in_tgi_shape(_respond(request), request.scope)


async def _respond(
    request: Request, *, streamed: bool = False, full_text: bool = False, in_list: bool = False
) -> Response:
    services: Services = request.app.state.services
    body = parse_body(await read_bytes(request), TgiRequest)
    streamed = streamed or bool(body.stream)
    job = await admit_tgi(body, services, caller_of(request.scope), streamed=streamed)
    if job.parameters.return_full_text is not None:
        full_text = job.parameters.return_full_text
    prefix = job.inputs if full_text else ""
    if streamed:
        return StreamedGeneration(job.generation, TgiEvents(job, prefix), services.heartbeat)
    try:
        return await _whole_answer(job, prefix, request, services, in_list=in_list)
    finally:
        job.generation.close()


async def _whole_answer(
    job: TgiGeneration, prefix: str, request: Request, services: Services, *, in_list: bool
) -> Response:
    try:
        choices = await job.generation.collect(request.receive)
    except ApiError as error:
        raise GenerationFailedError(error) from None
    readers = [TokenReader(job.model.tokenizer) for _ in choices]
    for reader, whole in zip(readers, choices, strict=True):
        reader.push(whole)
    best = max(range(len(readers)), key=lambda index: mean_logprob(readers[index]))
    answer = Answer(prefix + readers[best].text)
    if job.parameters.details or job.parameters.decoder_input_details:
        answer.details = _details(job, prefix, readers, best)
    headers = _headers(job, len(readers[best].tokens), best, services)
    return Response(msgspec.json.encode([answer] if in_list else answer), 200, headers, "application/json")


def _details(job: TgiGeneration, prefix: str, readers: list[TokenReader], best: int) -> Details:
    prefill = []
    if job.parameters.decoder_input_details:
        ids = job.generation.prompts[0].token_ids
        prefill = prefill_tokens(ids, readers[best].prompt_logprobs, job.model.tokenizer)
    sequences = [
        BestOfSequence(
            generated_text=prefix + reader.text,
            finish_reason=reader.finish_reason,
            generated_tokens=len(reader.tokens),
            seed=seed if job.sampled else None,
            prefill=prefill,
            tokens=reader.tokens,
            top_tokens=reader.top_tokens if job.parameters.top_n_tokens else UNSET,
        )
        for reader, seed in zip(readers, job.generation.seeds, strict=True)
    ]
    chosen = sequences.pop(best)
    return Details(
        finish_reason=chosen.finish_reason,
        generated_tokens=chosen.generated_tokens,
        seed=chosen.seed,
        prefill=prefill,
        tokens=chosen.tokens,
        provenance=job.generation.provenance,
        best_of_sequences=sequences or UNSET,
        top_tokens=chosen.top_tokens,
    )


def _headers(job: TgiGeneration, num_tokens: int, choice: int, services: Services) -> dict[str, str]:
    """TGI's headers; times are in milliseconds, but for x-compute-time, which is in seconds.

    An answer whose deadline passed while it waited has had no first step: all its time counts as inference.
    """
    now = time.monotonic()
    timings = job.generation.timings[choice]
    begun = job.started if timings is None else timings.first_scheduled
    times = {
        "total": now - job.received,
        "validation": job.started - job.received,
        "inference": now - begun,
        "per-token": (now - begun) / max(1, num_tokens),
    }
    headers = {
        "x-compute-type": services.ready_info.device,
        "x-compute-time": f"{times['total']:.6f}",
        "x-compute-characters": str(len(job.inputs)),
        "x-prompt-tokens": str(len(job.generation.prompts[0].token_ids)),
        "x-generated-tokens": str(num_tokens),
        "x-time-per-token": _milliseconds(times.pop("per-token")),
    }
    if timings is not None:
        times["queue"] = timings.first_scheduled - timings.arrival
    return headers | {f"x-{name}-time": _milliseconds(seconds) for name, seconds in times.items()}


def _milliseconds(seconds: float) -> str:
    return str(max(0, round(seconds * 1000)))


class TgiEvents:
    """An event per token, the first of index 1; nothing follows the last token's."""

    def __init__(self, job: TgiGeneration, prefix: str) -> None:
        self._job = job
        self._prefix = prefix
        self._reader = TokenReader(job.model.tokenizer)

    def event(self, delta: ChoiceDelta) -> bytes:
        reader = self._reader
        tokens = reader.push(delta)
        first = len(reader.tokens) - len(tokens)
        events = [
            StreamEvent(index + 1, token, reader.top_tokens[index] or UNSET)
            for index, token in enumerate(tokens, start=first)
        ]
        if delta.finish_reason is not None and events:
            events[-1].generated_text = self._prefix + reader.text
            events[-1].details = self._details() if self._job.parameters.details else None
        return b"".join(map(data_event, events))

    def end(self, generation: Generation) -> bytes:
        return b""

    def error(self, error: ApiError, request_id: str) -> bytes:
        return tgi_error_event(GenerationFailedError(error))

    def _details(self) -> StreamDetails:
        return StreamDetails(
            finish_reason=self._reader.finish_reason,
            generated_tokens=len(self._reader.tokens),
            seed=self._job.generation.seeds[0] if self._job.sampled else None,
            input_length=len(self._job.generation.prompts[0].token_ids),
            provenance=self._job.generation.provenance,
        )
