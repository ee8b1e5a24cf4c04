"""GET /requests/{id}: what became of a request, and how to make it again."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.caller import caller_of
from server.errors import HttpError
from server.history import describe
from server.routes.ops import json_response
from server.services import Services

router = APIRouter()


@router.get("/requests/{request_id}", summary="A past request: parameters, timings, and a body that repeats it")
async def get_request(request_id: str, request: Request) -> Response:
    services: Services = request.app.state.services
    if services.history is None:
        raise HttpError(404, "history_off", "no requests are kept; start the server with --request-history N")
    entry = services.history.find(request_id, caller_of(request.scope).pool)
    if entry is None:
        message = "no such request is kept here; only the latest ones are, each for the key that made it"
        raise HttpError(404, "request_not_found", message)
    return json_response(describe(entry))
