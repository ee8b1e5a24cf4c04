"""Whether requests are admitted, which ones run, and how the last of them end."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Protocol

from server.engine.interface import EngineClient
from server.engine.messages import FAILED
from server.errors import ApiError, draining_error, engine_down_error, loading_error


class Signals:
    """SIGTERM and SIGINT, from the moment this exists: the first asks for a drain, another for the end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.again = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.again if self.first.is_set() else self.first).set()


class Interruptible(Protocol):
    def interrupt(self, error: ApiError | None) -> None:
        """End with `error`, or silently when the client has left; harmless after the end."""
        ...


class Lifecycle:
    """The server's own state beside the engine's: draining, and the generations in flight."""

    def __init__(self, engine: EngineClient, health_timeout: float) -> None:
        self._engine = engine
        self._health_timeout = health_timeout
        self._active: set[Interruptible] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False
        self.tokenizer_loaded = False

    @property
    def num_active(self) -> int:
        return len(self._active)

    def add(self, generation: Interruptible) -> None:
        self._active.add(generation)
        self.idle.clear()

    def remove(self, generation: Interruptible) -> None:
        self._active.discard(generation)
        if not self._active:
            self.idle.set()

    def health_error(self) -> ApiError | None:
        """Why the engine does not answer, or None when it does."""
        if self._engine.state == "dead":
            return engine_down_error()
        if self._engine.state == "loading" or not self.tokenizer_loaded:
            return loading_error()
        if time.monotonic() - self._engine.last_heard > self._health_timeout:
            return engine_down_error()
        return None

    def degraded_reason(self) -> str | None:
        """Why answers are not to be trusted although they are given: a model that failed the check at load. None when
        all is well, or nothing is known."""
        info = self._engine.info
        failed = [model for model in info.models if model.self_check.status == FAILED] if info is not None else []
        return f"{failed[0].name} failed its self-check: {failed[0].self_check.reason}" if failed else None

    def admission_error(self) -> ApiError | None:
        """Why no request can be admitted now, or None."""
        return draining_error() if self.draining else self.health_error()

    def interrupt_all(self) -> None:
        for generation in list(self._active):
            generation.interrupt(draining_error())
