"""Server-sent events over plain ASGI messages: encoded bytes, no task and no timer per event.

One heartbeat looks after all streams once a second: it pings those that were silent and cuts those whose client
has stopped reading.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
from starlette.types import Scope, Send

ABORT_CONNECTION = "quill.abort_connection"
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_encoder = msgspec.json.Encoder()


def data_event(payload: object) -> bytes:
    return b"data: " + _encoder.encode(payload) + b"\n\n"


def error_event(body: bytes) -> bytes:
    return b"event: error\ndata: " + body + b"\n\n"


class EventSender:
    """Writes events to one client; the heartbeat reads its counters."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._abort: Callable[[], None] | None = scope.get(ABORT_CONNECTION)
        self.num_sent = 0
        self.num_pending = 0

    async def start(self) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    async def send(self, event: bytes) -> None:
        """Waits while the client's buffer is full."""
        self.num_pending += 1
        await self._send({"type": "http.response.body", "body": event, "more_body": True})
        self.num_pending -= 1
        self.num_sent += 1

    async def end(self, event: bytes) -> None:
        self.num_pending += 1  # for good: nothing may be sent after it
        await self._send({"type": "http.response.body", "body": event})

    async def ping(self) -> None:
        if not self.num_pending:
            await self.send(PING)

    def cut(self) -> None:
        """Drop the connection of a client that does not read, and with it all that waits to be sent."""
        if self._abort is not None:
            self._abort()


class Heartbeat:
    """Pings silent streams after `ping_interval` seconds, cuts unread ones after `write_timeout`."""

    def __init__(self, ping_interval: float, write_timeout: float) -> None:
        self._ping_interval = ping_interval
        self._write_timeout = write_timeout
        self._period = min(1.0, ping_interval / 2, write_timeout / 2)
        self._last_change: dict[EventSender, tuple[int, float]] = {}
        self._pings: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def add(self, sender: EventSender) -> None:
        self._last_change[sender] = (sender.num_sent, time.monotonic())
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def remove(self, sender: EventSender) -> None:
        self._last_change.pop(sender, None)

    async def _run(self) -> None:
        while self._last_change:
            await asyncio.sleep(self._period)
            now = time.monotonic()
            for sender in list(self._last_change):
                self._check(sender, now)
        self._task = None

    def _check(self, sender: EventSender, now: float) -> None:
        count, since = self._last_change[sender]
        if sender.num_sent != count:
            self._last_change[sender] = (sender.num_sent, now)
        elif sender.num_pending and now - since >= self._write_timeout:
            sender.cut()
        elif not sender.num_pending and now - since >= self._ping_interval - self._period / 2:
            task = asyncio.create_task(sender.ping())
            self._pings.add(task)
            task.add_done_callback(self._pings.discard)
