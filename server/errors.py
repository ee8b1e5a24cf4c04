"""What a client can be told, and nothing else: every error response is one of these.

Messages are fixed sentences: they name fields and limits, never repeat what the client sent and never hold a path,
an address or a trace.

ApiError
├── InvalidRequestError     422   `param` names the field
├── UnknownModelError       404
├── TaskNotServedError      404   the model is for something else
├── UnauthorizedError       401
├── HostNotAllowedError     400
├── BodyTooLargeError       413
├── BusyError               429   `retry_after` in seconds
├── UnavailableError        503   loading, draining or the engine is down; `retry_after` in seconds
└── InternalError           500   a fault of ours
"""

from __future__ import annotations

import msgspec


class ApiError(Exception):
    """An answer with `status` and the body `{"error": {...}}`."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.param = param
        self.headers: dict[str, str] = {}


class HttpError(ApiError):
    """Routing's own refusals (404, 405 and the like)."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers.update(headers or {})


class InvalidRequestError(ApiError):
    status = 422
    code = "invalid_request"


class UnknownModelError(ApiError):
    status = 404
    code = "model_not_found"

    def __init__(self) -> None:
        super().__init__("model is not served here; GET /v1/models lists the names", param="model")


class TaskNotServedError(ApiError):
    status = 404
    code = "task_not_served"


class UnauthorizedError(ApiError):
    status = 401
    code = "unauthorized"

    def __init__(self) -> None:
        super().__init__("a valid API key is required: send it as 'Authorization: Bearer KEY'")
        self.headers["www-authenticate"] = "Bearer"


class HostNotAllowedError(ApiError):
    status = 400
    code = "host_not_allowed"

    def __init__(self) -> None:
        super().__init__("the Host header names a host that this server does not answer for (see --allowed-hosts)")


class BodyTooLargeError(ApiError):
    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is larger than {limit} bytes")


class BusyError(ApiError):
    status = 429
    code = "queue_full"

    def __init__(self, message: str, retry_after: int, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.headers["retry-after"] = str(max(1, retry_after))


class UnavailableError(ApiError):
    status = 503
    code = "unavailable"

    def __init__(self, code: str, message: str, retry_after: int) -> None:
        super().__init__(message, code=code)
        self.headers["retry-after"] = str(max(1, retry_after))


class InternalError(ApiError):
    def __init__(self) -> None:
        super().__init__("the server failed to answer this request; the log tells more under its request_id")


class ClientGoneError(Exception):
    """The client left: there is nobody to answer."""


def loading_error(retry_after: int = 1) -> UnavailableError:
    return UnavailableError("loading", "the model is still loading", retry_after)


def draining_error(retry_after: int = 5) -> UnavailableError:
    return UnavailableError("draining", "the server is shutting down and takes no new requests", retry_after)


def engine_down_error(retry_after: int = 5) -> UnavailableError:
    return UnavailableError("engine_down", "the engine is down", retry_after)


def grammar_failed_error() -> InvalidRequestError:
    message = (
        "grammar led to a text that could not be finished: it became too complex or asked for characters that this"
        " model's vocabulary lacks; simplify it"
    )
    return InvalidRequestError(message, code="grammar_failed", param="grammar")


def request_failed_error(retry_after: int = 1) -> UnavailableError:
    return UnavailableError("request_failed", "the engine gave up on this request; try it again", retry_after)


def error_body(error: ApiError, request_id: str) -> bytes:
    """The error shape as JSON bytes."""
    return msgspec.json.encode(
        {
            "error": {
                "code": error.code,
                "message": error.message,
                "param": error.param,
                "request_id": request_id,
            }
        }
    )
