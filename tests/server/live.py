"""A real server on a free port of this machine, in a thread, and raw sockets to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvloop
from fastapi import FastAPI

from server.cli import listen
from server.serve import HttpServer, uvicorn_config
from tests.server.conftest import make_app, make_settings
from tests.server.fake_engine import FakeEngine


class LiveServer:
    """`url` answers until the context ends; `engine` lives in the server's own event loop."""

    def __init__(self, engine: FakeEngine, keys: list[str] | None = None, **values: Any) -> None:
        self.engine = engine
        self.app: FastAPI = make_app(engine, keys, **values)
        self._listener = listen("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = HttpServer(uvicorn_config(self.app, make_settings(**values)))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        await self.engine.start()
        await self._server.serve(sockets=[self._listener])

    def in_loop(self, function: Callable[[], None]) -> None:
        assert self.engine.loop is not None
        self.engine.loop.call_soon_threadsafe(function)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()

    @contextlib.contextmanager
    def connect(self, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
        with socket.socket() as sock:
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.settimeout(10)
            sock.connect(("127.0.0.1", self.port))
            yield sock


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> float:
    """Wait until the condition holds; returns the seconds it took and fails when it never does."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the condition never held"
        time.sleep(0.005)
    return time.monotonic() - start


def read_all(sock: socket.socket) -> bytes:
    """Everything until the server closes; a reset counts as closing."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65_536):
            parts.append(part)
    return b"".join(parts)
