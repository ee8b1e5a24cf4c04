"""OpenAI's list of models, which its clients ask for first."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.routes.ops import json_response
from server.services import Services

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models", summary="The served models in OpenAI's shape")
async def list_models(request: Request) -> Response:
    services: Services = request.app.state.services
    info = services.engine.info
    models = [
        {
            "id": name,
            "object": "model",
            "created": _STARTED,
            "owned_by": "quill",
            "max_model_len": None if info is None else info.max_model_len,
        }
        for name in services.models
    ]
    return json_response({"object": "list", "data": models})
