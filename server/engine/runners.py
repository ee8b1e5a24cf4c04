"""Runners: the model runners of an engine, one for each set of weights that a sequence still needs.

A name is answered by one set of weights at a time, its current generation. Sequences keep the one they began with, so
that weights can be replaced between two steps; the old ones go when their last sequence has ended.
"""

from __future__ import annotations

import dataclasses

from model.checkpoint import load_config
from model.errors import ConfigError
from server.engine.config import EngineConfig
from server.engine.model_runner import ModelRunner
from server.engine.sequence import InvalidSequenceError
from server.engine.shared_cache import CacheRoom, share_cache


def load_runners(config: EngineConfig) -> dict[str, ModelRunner]:
    """By name, in the order of the configuration. Raises QuillError for what cannot be loaded or run together."""
    configs = config.each()
    if len(configs) == 1:
        return {config.model_name: ModelRunner(config)}
    return {each.model_name: ModelRunner(each, room) for each, room in share_cache(configs)}


class Runners:
    """`current` names the generation that new sequences of a model get; generations count from 0 in the order of the
    models, and on with every replacement."""

    def __init__(self, runners: dict[str, ModelRunner]) -> None:
        self.current = {name: generation for generation, name in enumerate(runners)}
        self._runners = dict(enumerate(runners.values()))
        self._names = dict(enumerate(runners))
        self._next = len(runners)
        self._weights: dict[int, str] = {}
        self._held: set[int] = set()

    @property
    def names(self) -> list[str]:
        return list(self.current)

    @property
    def first(self) -> ModelRunner:
        """The runner of the model that a request gets which names none."""
        return self._runners[next(iter(self.current.values()))]

    def __getitem__(self, generation: int) -> ModelRunner:
        return self._runners[generation]

    def generation(self, name: str | None, weights: str | None = None) -> int:
        """That of the weights of that digest, as long as they are held, or else the current one.

        Raises InvalidSequenceError for a name that is not served.
        """
        name = next(iter(self.current)) if name is None else name
        if name not in self.current:
            raise InvalidSequenceError("model must be one of those that this engine serves")
        if weights is not None:
            for generation in self._held:
                if self._names[generation] == name and self._weights.get(generation) == weights:
                    return generation
        return self.current[name]

    def generations(self, name: str) -> list[int]:
        """Of all the weights that the name has had."""
        return [generation for generation, known in self._names.items() if known == name]

    @property
    def replaced(self) -> list[int]:
        """The generations that are only kept for sequences that began with them."""
        kept = {*self.current.values(), *self._held}
        return [generation for generation in self._runners if generation not in kept]

    def hold(self, generation: int, weights: str) -> None:
        """Keep a replaced generation until `release`, for sequences that are yet to come and name its weights."""
        self._weights[generation] = weights
        self._held.add(generation)

    def release(self, name: str, weights: str) -> None:
        self._held = {
            generation
            for generation in self._held
            if self._names[generation] != name or self._weights[generation] != weights
        }

    def load_beside(self, name: str, folder: str) -> ModelRunner:
        """A runner for other weights of the same architecture, in the cache of the current one; nothing refers to it
        yet. It may run in another thread. Raises QuillError."""
        current = self._runners[self.generation(name)]
        config = dataclasses.replace(current.config, model_path=folder)
        if load_config(folder) != current.model_config:
            raise ConfigError(f"the checkpoint is of another shape than what {name} serves; restart to serve it")
        return ModelRunner(config, CacheRoom(current.cache, current.limits))

    def replace(self, name: str, runner: ModelRunner) -> tuple[int, int]:
        """Answer for the name with `runner` from now on; (the old generation, the new one)."""
        old, new = self.generation(name), self._next
        self._next += 1
        self._runners[new], self._names[new], self.current[name] = runner, name, new
        return old, new

    def drop(self, generation: int) -> None:
        """Let go of replaced weights that no sequence needs any more."""
        del self._runners[generation]
