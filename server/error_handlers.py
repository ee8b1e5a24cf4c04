"""From any exception to the one error shape, and from that shape to bytes on the wire."""

from __future__ import annotations

import difflib
import http
import logging
from typing import get_args

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope, Send

from model.errors import InvalidSamplingParamsError
from server.errors import ApiError, HttpError, InternalError, InvalidRequestError, error_body
from server.openai_errors import is_openai_path, openai_error_body, openai_status

REQUEST_ID = "quill.request_id"

Location = tuple[int | str, ...]

logger = logging.getLogger("server")


def request_id(scope: Scope) -> str:
    """The internal id that the outermost middleware drew for this request."""
    return str(scope.get(REQUEST_ID, ""))


def error_response(error: ApiError, scope: Scope) -> Response:
    """The error in the shape of the route's own API."""
    if is_openai_path(scope["path"]):
        status = openai_status(error)
        return Response(openai_error_body(error), status, error.headers, "application/json")
    return Response(error_body(error, request_id(scope)), error.status, error.headers, "application/json")


async def send_error(error: ApiError, scope: Scope, send: Send) -> None:
    """Answer from a middleware, where no route and no request object exists."""
    response = error_response(error, scope)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


def handle_api_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ApiError)
    return error_response(exc, request.scope)


def handle_http_exception(request: Request, exc: Exception) -> Response:
    """Starlette's own 404 and 405, in our shape; its detail text is dropped."""
    assert isinstance(exc, HTTPException)
    return error_response(_from_http_exception(exc), request.scope)


def _from_http_exception(exc: HTTPException) -> ApiError:
    if exc.status_code == 404:
        return HttpError(404, "not_found", "there is no such route")
    if exc.status_code == 405:
        allow = (exc.headers or {}).get("Allow", "")
        return HttpError(405, "method_not_allowed", "this route has another method", {"allow": allow})
    if exc.status_code >= 500:
        return InternalError()
    phrase = http.HTTPStatus(exc.status_code).phrase
    return HttpError(exc.status_code, phrase.lower().replace(" ", "_"), phrase.lower())


def from_sampling_error(error: InvalidSamplingParamsError) -> InvalidRequestError:
    return InvalidRequestError(str(error), param=error.param)


def from_validation_error(error: ValidationError, schema: type[BaseModel]) -> InvalidRequestError:
    """The first fault as one sentence made of the schema's own words, never of the client's."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, location = first["type"], first["loc"]
    if kind == "json_invalid":
        return InvalidRequestError("the body must be valid JSON in UTF-8", code="invalid_json")
    if not location:
        return InvalidRequestError("the body must be a JSON object")
    schema, name, item = _innermost(schema, location)
    field = schema.model_fields.get(name)
    if field is None:
        return InvalidRequestError(_unknown_field(name, schema), code="unknown_field")
    if kind == "missing":
        return InvalidRequestError(f"{item}{name} is required", param=item + name)
    return InvalidRequestError(f"{item}{name} must be {field.description}", param=item + name)


def _innermost(schema: type[BaseModel], location: tuple[int | str, ...]) -> tuple[type[BaseModel], str, str]:
    """Step into a body's objects that have schemas of their own, as far as the fault's location leads.

    Returns the last schema, the name in it, and `list[index].` where the object is an item of a list.
    """
    item = ""
    while len(location) > 1 and (field := schema.model_fields.get(str(location[0]))) is not None:
        kinds = (field.annotation, *get_args(field.annotation))
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        in_list = isinstance(location[1], int)
        if inner is None or (in_list and len(location) == 2):
            break
        item = f"{location[0]}[{location[1]}]." if in_list else ""
        schema, location = inner, location[2 if in_list else 1 :]
    return schema, str(location[0]), item


def _unknown_field(name: str, schema: type[BaseModel]) -> str:
    close = difflib.get_close_matches(name, schema.model_fields, n=1) if len(name) <= 64 else []
    hint = f"; did you mean {close[0]}?" if close else f"; the fields are {', '.join(schema.model_fields)}"
    return f"the body has a field that is not known here{hint}"


def log_fault(error: Exception, scope: Scope) -> ApiError:
    """Log a fault that has no error shape of its own, and give the shape that the client sees."""
    logger.error("request failed", exc_info=error, extra={"request_id": request_id(scope)})
    return InternalError()
