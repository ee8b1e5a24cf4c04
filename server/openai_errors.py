"""Errors as OpenAI's clients read them, on every path under /v1."""

from __future__ import annotations

import msgspec

from server.errors import ApiError, InvalidRequestError, UnauthorizedError


def is_openai_path(path: str) -> bool:
    return path.startswith("/v1/")


def openai_status(error: ApiError) -> int:
    """OpenAI answers 400 where the native routes answer 422."""
    return 400 if isinstance(error, InvalidRequestError) else error.status


def openai_error_body(error: ApiError) -> bytes:
    """The error shape as JSON bytes; the request's id is in the header X-Request-Id alone."""
    code = "invalid_api_key" if isinstance(error, UnauthorizedError) else error.code
    fields = {"message": error.message, "type": _type(error.status), "param": error.param, "code": code}
    return msgspec.json.encode({"error": fields})


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
