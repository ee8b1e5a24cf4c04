"""Reads a TOML recipe and dotted overrides into a TrainConfig, and writes a TrainConfig back as TOML.

A key that does not exist, or a value of the wrong type, is a RecipeError that names the key. Free of torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from training.config import DataConfig, ModelSection, RunConfig, TrainConfig, TrainSection
from training.errors import RecipeError

SECTIONS: dict[str, type] = {"data": DataConfig, "model": ModelSection, "train": TrainSection, "run": RunConfig}
_UNIONS = (types.UnionType, typing.Union)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def load_config(recipe: Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The recipe's values, then each `section.key=value` on top. Raises RecipeError."""
    tree = _read_toml(recipe)
    for override in overrides:
        _apply_override(tree, override)
    return build_config(tree, source=str(recipe))


def build_config(tree: Mapping[str, Any], source: str = "the recipe") -> TrainConfig:
    """Checks names and types of a parsed tree. `source` is named in errors."""
    sections: dict[str, Any] = {}
    for name, values in tree.items():
        if name not in SECTIONS:
            raise RecipeError(f"{source}: unknown section [{name}]{_did_you_mean(name, SECTIONS)}")
        if not isinstance(values, Mapping):
            raise RecipeError(f"{source}: {name} must be a section of keys, written [{name}]")
        sections[name] = _build_section(name, values)
    return TrainConfig(**sections)


def config_to_tree(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Nested plain values; keys that are not set (None) are left out, as TOML has no null."""
    tree = dataclasses.asdict(config)
    return {name: {key: value for key, value in keys.items() if value is not None} for name, keys in tree.items()}


def config_to_toml(config: TrainConfig) -> str:
    return tomli_w.dumps(config_to_tree(config))


def describe_fields() -> str:
    """Every key with its default and meaning, one line each, for `train --help`."""
    lines: list[str] = []
    for section, cls in SECTIONS.items():
        for item in dataclasses.fields(cls):
            default = "" if item.default is None else f" [{item.default!r}]"
            lines.append(f"{section}.{item.name}{default}: {item.metadata['help']}")
    return "\n\n".join(lines)


def _read_toml(recipe: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{recipe}: no such recipe; see training/configs/ for ones to start from") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{recipe}: not a readable TOML file ({error})") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (separator and dot and key):
        raise RecipeError(f"override {override!r} is not of the form section.key=value, such as train.lr=3e-4")
    if section not in SECTIONS:
        raise RecipeError(f"override {override!r}: unknown section {section}{_did_you_mean(section, SECTIONS)}")
    hint = _field_types(section).get(key)
    if hint is None:
        raise RecipeError(f"unknown key {section}.{key}{_did_you_mean(key, _field_types(section), section)}")
    tree.setdefault(section, {})[key] = _parse_text(text.strip(), hint)


def _parse_text(text: str, hint: Any) -> Any:
    """A shell word as a TOML value; where the field takes text, the word itself, so quotes are not needed."""
    if str in _accepted(hint) or typing.get_origin(hint) is typing.Literal:
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
            return tomllib.loads(f"value = {text}")["value"]
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build_section(section: str, values: Mapping[str, Any]) -> Any:
    hints = _field_types(section)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise RecipeError(f"unknown key {section}.{key}{_did_you_mean(key, hints, section)}")
        checked[key] = _check_type(f"{section}.{key}", value, hints[key])
    return SECTIONS[section](**checked)


def _check_type(name: str, value: Any, hint: Any) -> Any:
    choices = _choices(hint)
    if choices:
        if value not in choices:
            raise RecipeError(f"{name} is {value!r} but must be one of {', '.join(choices)}")
        return value
    accepted = _accepted(hint)
    if float in accepted and type(value) is int:
        return float(value)
    if type(value) not in accepted or (type(value) is float and value != value):
        raise RecipeError(f"{name} is {value!r} but must be {' or '.join(_KINDS[kind] for kind in accepted)}")
    return value


def _field_types(section: str) -> dict[str, Any]:
    return typing.get_type_hints(SECTIONS[section])


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)


def _choices(hint: Any) -> tuple[str, ...]:
    for member in _members(hint):
        if typing.get_origin(member) is typing.Literal:
            return typing.get_args(member)
    return ()


def _accepted(hint: Any) -> tuple[type, ...]:
    if _choices(hint):
        return (str,)
    return tuple(member for member in _members(hint) if member is not types.NoneType)


def _did_you_mean(word: str, known: Iterable[str], section: str = "") -> str:
    """`; did you mean X?`, looking in the other sections too, or the list of what exists."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    prefix = f"{section}." if section else ""
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    for other in SECTIONS if section else ():
        if word in _field_types(other):
            return f"; did you mean {other}.{word}?"
    return f"; known are {', '.join(known)}"
