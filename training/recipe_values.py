"""One value of a recipe: parsed from a shell word, checked against its field's type. Free of torch."""

from __future__ import annotations

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from typing import Any

from training.config import SECTIONS
from training.errors import RecipeError

_UNIONS = (types.UnionType, typing.Union)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def field_types(section: str) -> dict[str, Any]:
    """The annotation of every key of a section."""
    return typing.get_type_hints(SECTIONS[section])


def parse_text(text: str, hint: Any) -> Any:
    """A shell word as a TOML value; where the field takes text, the word itself, so quotes are not needed.

    Nothing at all unsets a key that need not be set.
    """
    if not text and is_optional(hint):
        return None
    if str in _accepted(hint):
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
            return _toml_value(text)
        return text
    return _toml_value(text)


def check_type(name: str, value: Any, hint: Any) -> Any:
    """The value, an integer as a float where one is asked for. Raises RecipeError, naming the key."""
    if value is None and is_optional(hint):
        return None
    allowed = choices(hint)
    if allowed:
        if value not in allowed:
            raise RecipeError(f"{name} is {value!r} but must be one of {', '.join(allowed)}")
        return value
    accepted = _accepted(hint)
    if float in accepted and type(value) is int:
        value = _to_float(value)
    if type(value) not in accepted or (type(value) is float and not math.isfinite(value)):
        raise RecipeError(f"{name} is {value!r} but must be {' or '.join(_KINDS[kind] for kind in accepted)}")
    return value


def choices(hint: Any) -> tuple[str, ...]:
    """The words that a field may hold, or none where it is free."""
    for member in _members(hint):
        if typing.get_origin(member) is typing.Literal:
            return typing.get_args(member)
    return ()


def is_optional(hint: Any) -> bool:
    return types.NoneType in _members(hint)


def did_you_mean(word: str, known: Iterable[str], section: str = "") -> str:
    """`; did you mean X?`, looking in the other sections too, or the list of what exists."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    prefix = f"{section}." if section else ""
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    for other in SECTIONS if section else ():
        if word in field_types(other):
            return f"; did you mean {other}.{word}?"
    return f"; known are {', '.join(known)}"


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # of the wrong type, unless the field takes text: `check_type` says so


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)


def _accepted(hint: Any) -> tuple[type, ...]:
    if choices(hint):
        return (str,)
    return tuple(member for member in _members(hint) if member is not types.NoneType)
