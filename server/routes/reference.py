"""GET /docs: the API as a page."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api_reference import render_reference
from server.page_files import REFERENCE
from server.routes.page import HEADERS

router = APIRouter()


@router.head(REFERENCE, include_in_schema=False)
@router.get(REFERENCE, include_in_schema=False)
async def reference(request: Request) -> Response:
    """Addresses in the examples are the one by which the client came: HostMiddleware has looked at it."""
    document = request.app.openapi()
    base_url = f"{request.scope['scheme']}://{request.headers.get('host', 'localhost')}"
    text = render_reference(document, base_url)
    return Response(text, headers={**HEADERS, "content-type": "text/html; charset=utf-8"})
