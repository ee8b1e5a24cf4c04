"""SIGTERM and SIGINT as a request to save and stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType


@dataclass(slots=True)
class StopSignals:
    """True once a signal has come while `installed`. A second SIGINT interrupts at once."""

    received: list[int] = field(default_factory=list)

    def __call__(self) -> bool:
        return bool(self.received)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    @contextmanager
    def installed(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, self.handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)
