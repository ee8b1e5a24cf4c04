"""The page at `/`, its files, and the engine's numbers that it shows."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.page_files import page_files
from server.routes.ops import json_response
from server.services import Services

router = APIRouter()

# The page runs its own modules and talks to this server, and nothing else; it cannot be framed, and no string can
# become markup or code.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Stats(msgspec.Struct, frozen=True):
    """The engine as it is now, and its counters since its start. `state` is `ready` or why no request is admitted."""

    state: str
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    return _file_response("/", request)


@router.head("/static/{name}", include_in_schema=False)
@router.get("/static/{name}", include_in_schema=False)
async def static_file(name: str, request: Request) -> Response:
    return _file_response(f"/static/{name}", request)


@router.get("/stats", summary="The engine's load and counters as one small object")
async def stats(request: Request) -> Response:
    services: Services = request.app.state.services
    error, engine = services.lifecycle.admission_error(), services.engine.stats
    now = Stats(
        state="ready" if error is None else error.code,
        running=engine.num_running,
        waiting=engine.num_waiting,
        kv_blocks=engine.num_blocks,
        kv_blocks_used=engine.num_blocks - engine.num_free_blocks,
        prompt_tokens=engine.prompt_tokens,
        generation_tokens=engine.generation_tokens,
        prefix_cache_queries=engine.prefix_cache_queries,
        prefix_cache_hits=engine.prefix_cache_hits,
        preemptions=engine.num_preemptions,
    )
    return json_response(now)


def _file_response(path: str, request: Request) -> Response:
    """The file, or 304 when the client has it; its tag is asked for each time, as the name stays when it changes."""
    file = page_files().get(path)
    if file is None:
        raise HTTPException(404)
    headers = {**HEADERS, "etag": file.etag}
    if file.matches(request.headers.get("if-none-match")):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers={**headers, "content-type": file.media_type})
