"""POST /score: how well the model predicts texts."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from model.tokenizer import Tokenizer
from server.caller import caller_of
from server.error_handlers import request_id
from server.openapi import request_body
from server.output import Usage
from server.provenance import model_named, provenance
from server.request_body import read_body
from server.schemas.score import ScoreRequest
from server.score_texts import ScoredText
from server.scoring import admit_scoring
from server.services import Services
from server.tokenization import token_text

router = APIRouter()


class Token(msgspec.Struct):
    id: int
    text: str


class Result(msgspec.Struct):
    """`nll` is in nats for the whole text, `loss` per predicted token. `loss`, `perplexity` and `bits_per_byte` are
    null where there is nothing to tell of, and for what JSON cannot write. `logprobs` has an entry for each token."""

    num_tokens: int
    num_predictions: int
    nll: float
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    logprobs: list[float | None]
    tokens: list[Token] | None


class Answer(msgspec.Struct):
    id: str
    model: str
    created: int
    results: list[Result]
    usage: Usage
    provenance: dict[str, object]


_EXAMPLES: dict[str, Any] = {
    "texts": {"value": {"texts": ["To be, or not to be", "Be to not or, be to"]}},
    "each token": {"value": {"texts": ["To be, or not to be"], "return_tokens": True}},
}


@router.post(
    "/score",
    openapi_extra=request_body(ScoreRequest, examples=_EXAMPLES),
    summary="Log-probabilities, loss and perplexity of texts",
)
async def score(request: Request) -> Response:
    services: Services = request.app.state.services
    body = await read_body(request, ScoreRequest)
    scoring = await admit_scoring(body, services, caller_of(request.scope).pool)
    served = model_named(services.ready_info, body.model)
    texts = await scoring.run(request.receive)
    name = services.model_name(body.model)
    tokenizer = services.text_tools(name).tokenizer if body.return_tokens else None
    answer = Answer(
        id="score-" + request_id(request.scope).removeprefix("req-"),
        model=name,
        created=int(time.time()),
        results=[_result(text, tokenizer) for text in texts],
        usage=Usage(scoring.num_tokens, 0, 0),
        provenance=provenance(served),
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _result(text: ScoredText, tokenizer: Tokenizer | None) -> Result:
    evaluation = text.evaluation()
    values = {} if evaluation is None else evaluation.values()
    return Result(
        num_tokens=len(text.token_ids),
        num_predictions=text.num_predictions,
        nll=text.nll,
        loss=values.get("loss"),
        perplexity=values.get("perplexity"),
        bits_per_byte=values.get("bits_per_byte"),
        logprobs=text.logprobs,
        tokens=None if tokenizer is None else [Token(each, token_text(each, tokenizer)) for each in text.token_ids],
    )
