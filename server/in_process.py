"""Requests to the app without a socket: the same routes, validation and answers as over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer that is not streamed; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


async def post_json(app: ASGIApp, path: str, body: bytes) -> WholeAnswer:
    """The app's answer to a POST. Cancelling it is what a client's leaving would be."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": None,
        "server": None,
    }
    exchange = _Exchange(body)
    await app(scope, exchange.receive, exchange.send)
    return WholeAnswer(exchange.status, exchange.headers, b"".join(exchange.parts))


class _Exchange:
    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # nobody leaves: the app cancels this wait when it has answered
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))
