"""POST /explain: what the filters made of the distribution behind each generated token."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from model.tokenizer import Tokenizer
from server.caller import caller_of
from server.engine.messages import TokenExplanation
from server.error_handlers import request_id
from server.explain import Explained, explain
from server.openapi import request_body
from server.output import Usage
from server.provenance import model_named, provenance
from server.request_body import read_body
from server.schemas.explain import ExplainRequest
from server.services import Services
from server.tokenization import token_text

router = APIRouter()


class Token(msgspec.Struct):
    id: int
    text: str


class Alternative(msgspec.Struct):
    """`cut_by` names the filter that removed the token, null for one that could be drawn."""

    id: int
    text: str
    probability: float
    final_probability: float
    cut_by: str | None


class Filter(msgspec.Struct):
    name: str
    removed_tokens: int
    removed_mass: float
    moved_mass: float
    cut: list[int]


class ExplainedToken(msgspec.Struct):
    """`drawn` is what the seed draws in this place; null for given tokens without a seed."""

    index: int
    id: int
    text: str
    probability: float
    final_probability: float
    drawn: Token | None
    top: list[Alternative]
    filters: list[Filter]


class Answer(msgspec.Struct):
    id: str
    model: str
    created: int
    token_ids: list[int]
    finish_reason: str | None
    seed: int | None
    tokens: list[ExplainedToken]
    usage: Usage
    provenance: dict[str, object]


_EXAMPLES = {
    "text to generate": {
        "value": {"prompt": "To be, or not to be", "max_tokens": 16, "temperature": 0.8, "top_p": 0.9, "seed": 7}
    },
    "tokens that were generated": {"value": {"prompt": [10, 11], "tokens": [12, 13], "top_k": 40, "start": 1}},
}


@router.post(
    "/explain",
    openapi_extra=request_body(ExplainRequest, examples=_EXAMPLES),
    summary="What each filter removed, for each generated token",
)
async def post_explain(request: Request) -> Response:
    services: Services = request.app.state.services
    body = await read_body(request, ExplainRequest)
    explained = await explain(body, services, caller_of(request.scope), request.receive)
    name = explained.prompt.model
    tokenizer = services.text_tools(name).tokenizer
    has_seed = body.tokens is None or body.seed is not None
    answer = Answer(
        id="explain-" + request_id(request.scope).removeprefix("req-"),
        model=name,
        created=int(time.time()),
        token_ids=explained.token_ids,
        finish_reason=explained.finish_reason,
        seed=explained.prompt.params.seed if has_seed else None,
        tokens=[
            _token(index, told, tokenizer, has_seed=has_seed)
            for index, told in enumerate(explained.tokens, start=body.start)
        ],
        usage=_usage(explained, body),
        provenance=provenance(model_named(services.ready_info, name)),
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _usage(explained: Explained, body: ExplainRequest) -> Usage:
    num_generated = 0 if body.tokens is not None else len(explained.token_ids)
    return Usage(len(explained.prompt.token_ids), num_generated, 0)


def _token(index: int, told: TokenExplanation, tokenizer: Tokenizer, *, has_seed: bool) -> ExplainedToken:
    cut_by = {token_id: effect.name for effect in told.filters for token_id in effect.cut}
    chosen = next(each for each in told.alternatives if each.token_id == told.token_id)
    return ExplainedToken(
        index=index,
        id=told.token_id,
        text=token_text(told.token_id, tokenizer),
        probability=chosen.probability,
        final_probability=chosen.final_probability,
        drawn=Token(told.drawn_id, token_text(told.drawn_id, tokenizer)) if has_seed else None,
        top=[
            Alternative(
                each.token_id,
                token_text(each.token_id, tokenizer),
                each.probability,
                each.final_probability,
                cut_by.get(each.token_id),
            )
            for each in told.alternatives
        ],
        filters=[
            Filter(each.name, each.removed_tokens, each.removed_mass, each.moved_mass, each.cut)
            for each in told.filters
        ],
    )
