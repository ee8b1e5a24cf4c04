"""POST /classify: the label of each text, from a sequence-classification checkpoint."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.caller import caller_of
from server.classification import admit_texts
from server.openapi import request_body
from server.output import Usage
from server.request_body import read_body
from server.schemas.classify import ClassifyRequest
from server.services import Services

router = APIRouter()


class Result(msgspec.Struct):
    """`label` is the likeliest, `score` its probability, `scores` those of all labels."""

    label: str
    score: float
    scores: dict[str, float]


class Answer(msgspec.Struct):
    model: str
    results: list[Result]
    usage: Usage


_EXAMPLES: dict[str, Any] = {
    "a text": {"value": {"text": "WIN a prize now"}},
    "several texts": {"value": {"texts": ["WIN a prize now", "See you at noon"], "truncate": True}},
}


@router.post("/classify", openapi_extra=request_body(ClassifyRequest, examples=_EXAMPLES), summary="Label texts")
async def classify(request: Request) -> Response:
    services: Services = request.app.state.services
    body = await read_body(request, ClassifyRequest)
    classification = await admit_texts(body, services, caller_of(request.scope).pool)
    scores = await classification.run(request.receive)
    labels = services.ready_info.models[0].labels
    answer = Answer(
        model=body.model or services.models[0],
        results=[_result(labels, row) for row in scores],
        usage=Usage(classification.num_tokens, 0, 0),
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _result(labels: list[str], scores: list[float]) -> Result:
    best = max(range(len(scores)), key=scores.__getitem__)
    return Result(labels[best], scores[best], dict(zip(labels, scores, strict=True)))
