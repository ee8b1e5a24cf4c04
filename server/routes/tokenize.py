"""POST /tokenize and POST /detokenize: text to token ids and back, without the engine."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from server.errors import InvalidRequestError
from server.openapi import request_body
from server.prompts import off_loop
from server.provenance import context_of
from server.request_body import parse_body, read_bytes
from server.schemas.tgi import TgiTokenizeRequest
from server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from server.services import Services
from server.tgi_errors import in_tgi_shape
from server.tgi_request import is_tgi_body
from server.tokenization import encode_text, place_tokens, token_text

router = APIRouter()
_TEXTS = {
    "a text": {"value": {"text": "To be, or not to be", "return_token_strs": True}},
    "TGI's body": {"value": {"inputs": "To be, or not to be"}},
}
_TOKENS = {"tokens": {"value": {"tokens": [84, 111]}}}


class Tokens(msgspec.Struct, omit_defaults=True):
    """`max_model_len` is the model's context in tokens; `token_strs` holds the texts of the tokens one by one."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """`prompt` repeats `text` under the name that vLLM's clients read."""

    text: str
    prompt: str


@router.post(
    "/tokenize",
    openapi_extra=request_body(TokenizeRequest, TgiTokenizeRequest, examples=_TEXTS),
    summary="The token ids of a text",
)
async def tokenize(request: Request) -> Response:
    raw = await read_bytes(request)
    services: Services = request.app.state.services
    if is_tgi_body(raw):
        return await in_tgi_shape(_tokenize_tgi(raw, services), request.scope)
    body = parse_body(raw, TokenizeRequest)
    if (body.text is None) == (body.prompt is None):
        raise InvalidRequestError("give either text or prompt", param="text")
    text, param = (body.text, "text") if body.text is not None else (body.prompt or "", "prompt")
    tokenizer = _tokenizer(body.model, services)
    ids = await encode_text(text, param, tokenizer, add_special=body.add_special_tokens)
    answer = Tokens(ids, len(ids), context_of(services.ready_info, body.model))
    if body.return_token_strs:
        answer.token_strs = await off_loop(len(ids), lambda: [token_text(token_id, tokenizer) for token_id in ids])
    return Response(msgspec.json.encode(answer), media_type="application/json")


@router.post(
    "/detokenize", openapi_extra=request_body(DetokenizeRequest, examples=_TOKENS), summary="The text of token ids"
)
async def detokenize(request: Request) -> Response:
    services: Services = request.app.state.services
    body = parse_body(await read_bytes(request), DetokenizeRequest)
    tokenizer = _tokenizer(body.model, services)
    try:
        text = await off_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens))
    except TokenizerError:
        raise InvalidRequestError("tokens holds an id that is no token of this model", param="tokens") from None
    return Response(msgspec.json.encode(Text(text, text)), media_type="application/json")


def _tokenizer(name: str | None, services: Services) -> Tokenizer:
    return services.text_tools(services.model_name(name)).tokenizer


async def _tokenize_tgi(raw: bytes, services: Services) -> Response:
    body = parse_body(raw, TgiTokenizeRequest)
    tokenizer = _tokenizer(body.model, services)
    ids = await encode_text(body.inputs, "inputs", tokenizer)
    content = await off_loop(len(ids), lambda: msgspec.json.encode(place_tokens(body.inputs.encode(), ids, tokenizer)))
    return Response(content, media_type="application/json")
