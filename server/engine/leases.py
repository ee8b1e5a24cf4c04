"""Which weights requests may still name: those that are served, and older ones that somebody holds. Free of torch.

The engine swaps weights between two of its steps, and hears of requests in the order in which they were sent. So a
request names the weights that were served, as far as the sender knew, when it was admitted; and once the sender has
heard of new ones and nobody holds the old, the engine is told that nothing more will name these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from server.engine.messages import EngineInfo


class WeightsLease:
    """Until `release`, which is harmless when called twice, requests may name `weights`."""

    def __init__(self, weights: str | None, end: Callable[[], None]) -> None:
        self.weights = weights
        self._end: Callable[[], None] | None = end

    def release(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()


class WeightsLeases:
    """`release(model, weights)` is called for replaced weights once nobody holds them."""

    def __init__(self, release: Callable[[str, str], None]) -> None:
        self._release = release
        self._current: dict[str, str] = {}
        self._held: Counter[tuple[str, str]] = Counter()

    def update(self, info: EngineInfo) -> None:
        """Take in what the engine serves now."""
        before, self._current = self._current, {model.name: model.weights_digest for model in info.models}
        for name, weights in before.items():
            self._settle(name, weights)

    def current(self, model: str | None) -> str | None:
        """The weights that are served under the name, or by default; None before anything is."""
        return self._current.get(self._name(model))

    def hold(self, model: str | None = None) -> WeightsLease:
        name, weights = self._name(model), self.current(model)
        if weights is None:
            return WeightsLease(None, lambda: None)
        key = name, weights
        self._held[key] += 1

        def end() -> None:
            self._held[key] -= 1
            self._settle(*key)

        return WeightsLease(weights, end)

    def _name(self, model: str | None) -> str:
        return next(iter(self._current), "") if model is None else model

    def _settle(self, name: str, weights: str) -> None:
        if self._current.get(name) != weights and self._held[name, weights] <= 0:
            del self._held[name, weights]
            self._release(name, weights)
