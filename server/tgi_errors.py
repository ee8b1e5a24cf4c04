"""Errors in the shape of Text Generation Inference: `{"error": "…", "error_type": "…"}`."""

from __future__ import annotations

from collections.abc import Awaitable

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from server.error_handlers import log_fault
from server.errors import ApiError, ClientGoneError

# What TGI's clients tell apart; all else goes by Quill's own code.
_TYPES = {422: "validation", 424: "generation", 429: "overloaded"}


class TgiError(msgspec.Struct):
    error: str
    error_type: str


class GenerationFailedError(ApiError):
    """An accepted request that the engine gave up on, or that a drain cut off."""

    status = 424
    code = "generation"

    def __init__(self, cause: ApiError) -> None:
        super().__init__(cause.message)
        self.headers.update(cause.headers)


def tgi_error_body(error: ApiError) -> bytes:
    return msgspec.json.encode(TgiError(error.message, _TYPES.get(error.status, error.code)))


async def in_tgi_shape(answer: Awaitable[Response], scope: Scope) -> Response:
    """The answer, or the refusal that making it raised."""
    try:
        return await answer
    except ClientGoneError:
        raise
    except ApiError as error:
        refusal = error
    except Exception as fault:
        refusal = log_fault(fault, scope)
    return Response(tgi_error_body(refusal), refusal.status, refusal.headers, "application/json")


def tgi_error_event(error: ApiError) -> bytes:
    """TGI's events have no names: an error is told by its field."""
    return b"data: " + tgi_error_body(error) + b"\n\n"
