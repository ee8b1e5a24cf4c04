"""Names that stand for several checkpoints (A/B tests), and checkpoints that score what others answer (shadows)."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_SPLIT_FORM = "must read NAME=MODEL:WEIGHT,MODEL:WEIGHT, such as chat=old:9,new:1"
_SHADOW_FORM = "must read MODEL=CANDIDATE:FRACTION, such as live=new:0.1"


@dataclass(frozen=True, slots=True)
class Split:
    """A name whose requests are answered by one of `models`, each in proportion to its weight."""

    models: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> dict[str, float]:
        """Of the requests, by model."""
        return {model: weight / sum(self.weights) for model, weight in zip(self.models, self.weights, strict=True)}

    def choose(self, name: str, seed: int) -> str:
        """The model for a request to `name`, by its seed alone: the same request gets the same model again.

        The seed is hashed, so that neighbouring seeds fall apart, and with the name, so that two splits do not send
        the same requests to their first model.
        """
        digest = hashlib.sha256(f"{name}\0{seed}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64 * sum(self.weights)
        bounds = list(itertools.accumulate(self.weights))
        return self.models[min(bisect.bisect_right(bounds, place), len(self.models) - 1)]


@dataclass(frozen=True, slots=True)
class Shadow:
    """`candidate` scores this fraction of the answers of another model."""

    candidate: str
    fraction: float


def parse_splits(items: Iterable[str], models: Collection[str]) -> dict[str, Split]:
    """By name, from `name=model:weight` and the `model:weight` that follow it. Raises ValueError with a sentence."""
    found: dict[str, list[tuple[str, float]]] = {}
    name = ""
    for item in items:
        head, equals, rest = item.partition("=")
        if equals:
            name = head.strip()
            if name in found:
                raise ValueError(f"gives {name} twice")
            if name in models:
                raise ValueError(f"gives a split the name of the model {name}; choose another")
            found[name] = []
        if not name:
            raise ValueError(_SPLIT_FORM)
        found[name].append(_part(rest if equals else item, _SPLIT_FORM, models))
    for name, parts in found.items():
        if len({model for model, _ in parts}) < max(2, len(parts)):
            raise ValueError(f"must give {name} at least two models, each once")
    return {name: Split(*map(tuple, zip(*parts, strict=True))) for name, parts in found.items()}


def parse_shadows(items: Iterable[str], models: Collection[str]) -> dict[str, Shadow]:
    """By the model whose answers are scored, from `model=candidate:fraction`. Raises ValueError with a sentence."""
    found: dict[str, Shadow] = {}
    for item in items:
        live, _, rest = item.partition("=")
        live = live.strip()
        candidate, fraction = _part(rest, _SHADOW_FORM, models)
        if live not in models:
            raise ValueError(f"names {live}, which is not served; give one of {', '.join(models)}")
        if live in found or live == candidate or fraction > 1:
            raise ValueError("must give each model one other model as its shadow, and a fraction of at most 1")
        found[live] = Shadow(candidate, fraction)
    return found


def _part(text: str, form: str, models: Collection[str]) -> tuple[str, float]:
    model, _, number = text.strip().rpartition(":")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(form) from None
    if not model or not math.isfinite(value) or value <= 0:
        raise ValueError(form)
    if model not in models:
        raise ValueError(f"names {model}, which is not served; give one of {', '.join(models)}")
    return model, value
