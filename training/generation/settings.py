"""Sampling parameters by name, as the user of `generate --interactive` sets them. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from model.sampling_params import MAX_SEED, SamplingParams
from training.errors import RecipeError

_KINDS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "min_tokens": int,
    "ignore_eos": bool,
    "seed": int,
}
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KIND_NAMES: dict[type, str] = {float: "a number", int: "a whole number", bool: "on or off"}


def parse_logit_bias(pairs: Iterable[str]) -> dict[int, float]:
    """ID=BIAS pairs. Raises RecipeError for what is none."""
    biases: dict[int, float] = {}
    for pair in pairs:
        token_id, _, bias = pair.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise RecipeError(f"--logit-bias is {pair!r} but must have the form ID=BIAS, as in 42=-1.5") from None
    return biases


def parse_stops(stops: Iterable[str]) -> tuple[str, ...]:
    """Stop strings as they are typed: a line end is written \\n. Raises RecipeError for an empty one."""
    found = tuple(stop.replace("\\n", "\n") for stop in stops)
    if not all(found):
        raise RecipeError("--stop must not be empty; give the string that ends a text")
    return found


@dataclass(frozen=True, slots=True)
class Settings:
    """What each answer is generated with; `stop` are strings that end it."""

    params: SamplingParams
    stop: tuple[str, ...] = ()

    def with_value(self, name: str, text: str) -> Settings:
        """One setting changed. Raises RecipeError or InvalidSamplingParamsError, naming it."""
        name = name.replace("-", "_")
        if name == "stop":
            return replace(self, stop=parse_stops([text]) if text else ())
        if name not in _KINDS:
            raise RecipeError(f"setting {name!r} is unknown; choose among {', '.join([*_KINDS, 'stop'])}")
        params = replace(self.params, **{name: _parse(name, text)})
        params.require_tokens()
        return replace(self, params=params)

    def describe(self) -> str:
        values = [f"{name}={getattr(self.params, name)}" for name in _KINDS]
        return " ".join([*values, f"stop={list(self.stop)}"])

    def with_next_seed(self) -> Settings:
        return replace(self, params=replace(self.params, seed=(self.params.seed + 1) % (MAX_SEED + 1)))


def _parse(name: str, text: str) -> Any:
    kind = _KINDS[name]
    try:
        return _SWITCH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise RecipeError(f"{name} is {text!r} but must be {_KIND_NAMES[kind]}") from None
