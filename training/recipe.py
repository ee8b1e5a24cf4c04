"""Reads a TOML recipe and dotted overrides into a TrainConfig, and writes a TrainConfig back as TOML.

    config = load_config("shakespeare", ["train.max_steps=500"])

A recipe is a file, or the name of one of `training/configs`. A key that does not exist, or a value of the wrong type,
is a RecipeError that names the key. Free of torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from training.config import SECTIONS, TrainConfig
from training.errors import RecipeError
from training.recipe_values import check_type, choices, did_you_mean, field_types, parse_text

CONFIGS = Path(__file__).parent / "configs"
_WIDTH = 78  # of help and comments: fits a terminal of 80 columns
_KEY_WIDTH = 36


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The recipe's values, then each `section.key=value` on top. Raises RecipeError."""
    path = find_recipe(recipe)
    tree = _read_toml(path)
    for override in overrides:
        _apply_override(tree, override)
    return build_config(tree, source=str(path))


def find_recipe(recipe: str | Path) -> Path:
    """The file of that path, or the package's recipe of that name. Raises RecipeError where there is neither."""
    path, known = Path(recipe), recipe_names()
    if path.is_file():
        return path
    is_name = len(path.parts) == 1 and path.suffix in ("", ".toml")
    if is_name and path.stem in known:
        return CONFIGS / f"{path.stem}.toml"
    if path.exists():
        return path
    hint = did_you_mean(path.stem, known) if is_name else f"; known by name are {', '.join(known)}"
    raise RecipeError(f"{recipe}: no such recipe{hint}")


def recipe_names() -> list[str]:
    """The package's recipes."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def recipe_summary(name: str) -> str:
    """What one of the package's recipes is for: the first sentence of its comment."""
    paragraph = " ".join(leading_comment(CONFIGS / f"{name}.toml").split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."


def leading_comment(recipe: Path) -> str:
    """The comment that a recipe begins with, without its number signs."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)


def build_config(tree: Mapping[str, Any], source: str = "the recipe") -> TrainConfig:
    """Checks names and types of a parsed tree. `source` is named in errors."""
    sections: dict[str, Any] = {}
    for name, values in tree.items():
        if name not in SECTIONS:
            raise RecipeError(f"{source}: unknown section [{name}]{did_you_mean(name, SECTIONS)}")
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


def config_to_commented_toml(config: TrainConfig, heading: str = "") -> str:
    """Every key with its meaning above it; one that is not set is written as a comment. Reads back as `config`."""
    blocks = ["\n".join(f"# {line}".rstrip() for line in heading.split("\n"))] if heading else []
    for section, cls in SECTIONS.items():
        blocks.append("\n".join([*_comment(_summary(cls)), f"[{section}]"]))
        for item in dataclasses.fields(cls):
            value = getattr(getattr(config, section), item.name)
            line = f"# {item.name} =" if value is None else tomli_w.dumps({item.name: value}).rstrip("\n")
            blocks.append("\n".join([*_comment(_meaning(section, item)), line]))
    return "\n\n".join(blocks) + "\n"


def describe_fields() -> str:
    """Every key with its default and meaning, by section, in lines of at most 78 columns."""
    blocks: list[str] = []
    for section, cls in SECTIONS.items():
        lines = textwrap.wrap(f"{section}: {_summary(cls)}", _WIDTH)
        for item in dataclasses.fields(cls):
            value = "" if item.default in (None, "") else f" = {_shown(item.default)}"
            lines += _two_columns(f"  {section}.{item.name}{value}", _meaning(section, item))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _two_columns(left: str, right: str) -> list[str]:
    meaning = textwrap.wrap(right, _WIDTH - _KEY_WIDTH, break_on_hyphens=False)
    first = [f"{left:<{_KEY_WIDTH}}{meaning.pop(0)}"] if len(left) < _KEY_WIDTH else [left]
    return first + [" " * _KEY_WIDTH + line for line in meaning]


def _meaning(section: str, item: dataclasses.Field[Any]) -> str:
    """The field's help, and its choices where the help does not name them."""
    text = str(item.metadata["help"])
    allowed = choices(field_types(section)[item.name])
    if allowed and not all(choice in text for choice in allowed):
        text += f" (one of {', '.join(allowed)})"
    return text


def _shown(value: Any) -> str:
    """As one writes it in TOML."""
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def _summary(cls: type) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 116)]


def _read_toml(recipe: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{recipe}: not a readable TOML file ({error})") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (separator and dot and key):
        raise RecipeError(f"override {override!r} is not of the form section.key=value, such as train.lr=3e-4")
    if section not in SECTIONS:
        raise RecipeError(f"override {override!r}: unknown section {section}{did_you_mean(section, SECTIONS)}")
    hint = field_types(section).get(key)
    if hint is None:
        raise RecipeError(f"unknown key {section}.{key}{did_you_mean(key, field_types(section), section)}")
    values = tree.setdefault(section, {})
    if not isinstance(values, dict):
        raise RecipeError(f"{section} must be a section of keys, written [{section}]")
    values[key] = parse_text(text.strip(), hint)


def _build_section(section: str, values: Mapping[str, Any]) -> Any:
    hints = field_types(section)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise RecipeError(f"unknown key {section}.{key}{did_you_mean(key, hints, section)}")
        checked[key] = check_type(f"{section}.{key}", value, hints[key])
    return SECTIONS[section](**checked)
