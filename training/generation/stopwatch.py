"""How fast text came: time to the first token, tokens a second. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Iterator

from training.generation.sample import Delta


class Stopwatch:
    """Runs from its first `start` to its last `count`. Times are in seconds."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._first: float | None = None
        self._last = 0.0
        self.num_tokens = 0

    def start(self) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def count(self, num_tokens: int) -> None:
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        self.num_tokens += num_tokens

    def timed(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        self.start()
        for delta in deltas:
            self.count(1)
            yield delta

    @property
    def seconds(self) -> float:
        return self._last - self._start if self._start is not None and self._first is not None else 0.0

    @property
    def first_token_seconds(self) -> float:
        return self._first - self._start if self._start is not None and self._first is not None else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def values(self) -> dict[str, float]:
        return {
            "tokens": self.num_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
        }

    def describe(self) -> str:
        return (
            f"{self.num_tokens:,} tokens in {self.seconds:.2f} s: {self.tokens_per_second:,.1f} tokens/s, "
            f"the first after {self.first_token_seconds * 1000:.0f} ms"
        )
