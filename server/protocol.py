"""The connection's own defences: a deadline for a request to arrive, a cap on headers and on connections, and an end
for clients that do not read. Uvicorn has none of these."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.sse import ABORT_CONNECTION

MAX_HEAD_BYTES = 32 * 1024
WRITE_BUFFER = 16 * 1024
"""Bytes that wait in the process, and as many in the kernel, before whoever writes an answer has to wait."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Seconds for a request to arrive whole, seconds for a client to take an answer, and open connections."""

    request_timeout: float
    linger_timeout: float
    max_connections: int


def _refusal(status: str, code: str, message: str, *extra: str) -> bytes:
    body = msgspec.json.encode({"error": {"code": code, "message": message, "param": None, "request_id": ""}})
    head = [
        f"HTTP/1.1 {status}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *extra,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


BAD_HTTP = _refusal("400 Bad Request", "invalid_http", "the request is not valid HTTP/1.1")
TIMED_OUT = _refusal("408 Request Timeout", "request_timeout", "the request did not arrive in time")
HEAD_TOO_LARGE = _refusal(
    "431 Request Header Fields Too Large", "headers_too_large", f"the headers are larger than {MAX_HEAD_BYTES} bytes"
)
TOO_MANY = _refusal(
    "503 Service Unavailable", "too_many_connections", "too many connections are open", "retry-after: 1"
)


class GuardedProtocol(HttpToolsProtocol):
    """`limits` is set on a subclass by `guarded_protocol`."""

    limits: ClassVar[ConnectionLimits]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._deadline: asyncio.TimerHandle | None = None
        # The cycle whose turn it is; `cycle` is the newest, which may still wait behind it.
        self._current: RequestResponseCycle | None = None
        self._in_body = False
        self._num_received = 0
        self._num_head_bytes = 0
        _limit_buffers(transport)
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(TOO_MANY)
        else:
            self._arm_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_deadline()
        if self._answering:
            self._disconnect()  # uvicorn tells only the newest cycle
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._deadline is None and not self._answering:
            self._arm_deadline()
        self._num_received += len(data)
        if not self._in_body:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if not self._in_body and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_header_bytes = 0
        if self._deadline is None:
            self._arm_deadline()
        scope = cast(MutableMapping[str, Any], self.scope)
        scope[ABORT_CONNECTION] = self.transport.abort

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_header_bytes += len(name) + len(value)
        if self._num_header_bytes > MAX_HEAD_BYTES:
            raise ValueError("headers too large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body = True
        super().on_headers_complete()
        if not self.pipeline:
            self._current = self.cycle

    def on_message_complete(self) -> None:
        self._in_body = False
        self._num_head_bytes = 0
        self._disarm_deadline()
        super().on_message_complete()
        answered_early = self.cycle is not None and self.cycle.response_complete and not self.pipeline
        if answered_early and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._current = self.pipeline[-1][0]
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(self.limits.linger_timeout, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection is closed; one that still holds an unread answer is cut, for it would never drain."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HEAD_TOO_LARGE if self._num_header_bytes > MAX_HEAD_BYTES else BAD_HTTP)

    def _unsupported_upgrade_warning(self) -> None:
        """A client's wish for another protocol is not worth a log line."""

    _num_header_bytes = 0

    @property
    def _answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

    def _disconnect(self) -> None:
        """Let the app see that its client has left."""
        assert self._current is not None, "only an answer under way can lose its client"
        self._current.disconnected = True
        self._current.message_event.set()

    def _arm_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.limits.request_timeout, self._deadline_passed)

    def _disarm_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _deadline_passed(self) -> None:
        self._deadline = None
        if self.pipeline or (self._answering and not self._in_body):
            self._arm_deadline()  # an earlier answer is under way: the next request's time has not come
            return
        answered = self._in_body and self.cycle is not None and self.cycle.response_started
        if answered or not self._num_received:
            self.transport.abort()
        else:
            self._refuse(TIMED_OUT)

    def _refuse(self, answer: bytes) -> None:
        """Say why and close, or just cut an answer that is under way; the app sees a client that has left."""
        if self.transport.is_closing():
            return
        if self._answering and self._current is not None and self._current.response_started:
            self.transport.abort()
            return
        self.transport.write(answer)
        if self._answering:
            self._disconnect()
        self.transport.close()


def _limit_buffers(transport: asyncio.Transport) -> None:
    """Let a stream know soon that its client is behind: its tokens then gather, instead of lying in buffers as events
    that are old when they are read. What has left for the network is not counted."""
    transport.set_write_buffer_limits(high=WRITE_BUFFER)
    sock = transport.get_extra_info("socket")
    if sock is not None and hasattr(socket, "TCP_NOTSENT_LOWAT") and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, WRITE_BUFFER)


def guarded_protocol(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """A protocol class with these limits, for uvicorn's `http` option."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})
