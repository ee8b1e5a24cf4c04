"""A tiny HTTP server that streams prepared bytes, split wherever a test likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

Answer = Callable[[dict[str, Any]], list[bytes]]
"""A request's body → the response, as pieces that are written (and so read) one at a time."""


def event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def native_events(num_tokens: int, *, prompt_tokens: int = 3, cached_tokens: int = 0) -> list[bytes]:
    """What /generate streams for a greedy request of `num_tokens`, one token per event."""
    deltas = [event({"id": "gen-1", "choices": [{"index": 0, "text": "", "token_ids": [7]}]})] * num_tokens
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens, "cached_tokens": cached_tokens}
    return [*deltas, event({"id": "gen-1", "choices": [], "usage": usage}) + b"data: [DONE]\n\n"]


def chunked(events: list[bytes]) -> list[bytes]:
    return [HEAD, *map(chunk, events), b"0\r\n\r\n"]


def stream_of(body: dict[str, Any]) -> list[bytes]:
    return chunked(native_events(body["max_tokens"], prompt_tokens=len(body["prompt"])))


class FakeServer:
    """Keeps every request's body; `num_connections` counts what clients opened."""

    def __init__(self, answer: Answer, pause: float) -> None:
        self._answer = answer
        self._pause = pause
        self.bodies: list[dict[str, Any]] = []
        self.num_connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                for piece in self._answer(body):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(self._pause)
                if b"connection: close" in self._answer(body)[0]:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def fake_server(answer: Answer = stream_of, pause: float = 0.0) -> AsyncIterator[FakeServer]:
    fake = FakeServer(answer, pause)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    fake.url = f"http://127.0.0.1:{port}/generate"
    async with server:
        yield fake
