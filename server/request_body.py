"""JSON bodies, strictly validated against their schema."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from server.error_handlers import from_validation_error
from server.errors import ClientGoneError, InvalidRequestError

Schema = TypeVar("Schema", bound=BaseModel)


async def read_body(request: Request, schema: type[Schema]) -> Schema:
    """Raises InvalidRequestError, or ClientGoneError if the body never came whole."""
    return parse_body(await read_bytes(request), schema)


async def read_bytes(request: Request) -> bytes:
    """For routes whose body's schema shows in the body. Raises what `read_body` raises."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise InvalidRequestError("the Content-Type header must be application/json")
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientGoneError from None


def parse_body(raw: bytes, schema: type[Schema]) -> Schema:
    """Raises InvalidRequestError."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation_error(error, schema) from None
