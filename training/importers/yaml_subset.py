"""The part of YAML in which `yaml.dump` writes a settings file: block mappings and lists of plain values.

litgpt's model_config.yaml is such a file, and the only YAML that this package meets, so no YAML library is among the
dependencies. Whatever else YAML can express (anchors, tags, flow collections, folded text) is refused with its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from model.errors import CheckpointError

_MAX_BYTES = 1 << 20
_KEY = re.compile(r"([A-Za-z_][\w.-]*):(?: +(.*))?")
_CONSTANTS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    "{}": {},
    "[]": [],
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_UNREAD = "&*!|>%@`[{?"  # first characters of what is beyond plain values


class _LineError(Exception):
    """A line, by its number, that is beyond this subset."""


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in the file. Raises CheckpointError, naming the line, for anything but a plain mapping."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_BYTES} bytes; use the file that belongs to this model")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; copy it from where the model was trained") from None
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{path} cannot be read as UTF-8 text; copy it again") from None
    try:
        return parse_yaml(text)
    except _LineError as problem:
        raise CheckpointError(f"{path}: {problem} is not a plain `key: value`; write it as yaml.dump does") from None


def parse_yaml(text: str) -> dict[str, object]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if not _is_blank(line)]
    values, end = _mapping(lines, 0, 0)
    if end < len(lines):
        raise _LineError(f"line {lines[end][0]}")
    return values


def _is_blank(line: str) -> bool:
    stripped = line.strip()
    return not stripped or stripped.startswith("#") or stripped == "---"


def _mapping(lines: Sequence[tuple[int, str]], start: int, indent: int) -> tuple[dict[str, object], int]:
    """The mapping whose keys stand at `indent`, and the index of the first line behind it."""
    values: dict[str, object] = {}
    while start < len(lines) and _indent(lines[start][1]) == indent:
        number, line = lines[start]
        match = _KEY.fullmatch(line.strip())
        if match is None or match[1] in values:
            raise _LineError(f"line {number}")
        start += 1
        if match[2]:
            values[match[1]] = _scalar(match[2], number)
        else:
            values[match[1]], start = _block(lines, start, indent)
    return values, start


def _block(lines: Sequence[tuple[int, str]], start: int, indent: int) -> tuple[object, int]:
    """What stands below a key without a value on its own line: a deeper mapping, a list, or nothing."""
    if start == len(lines):
        return None, start
    line, deeper = lines[start][1], _indent(lines[start][1])
    if deeper >= indent and line.lstrip().startswith("- "):
        return _list(lines, start, deeper)
    return _mapping(lines, start, deeper) if deeper > indent else (None, start)


def _list(lines: Sequence[tuple[int, str]], start: int, indent: int) -> tuple[list[object], int]:
    items: list[object] = []
    while start < len(lines) and _indent(lines[start][1]) == indent and lines[start][1].lstrip().startswith("- "):
        number, line = lines[start]
        items.append(_scalar(line.strip()[2:].strip(), number))
        start += 1
    return items, start


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _scalar(text: str, number: int) -> object:
    if text[:1] in ("'", '"'):
        return _quoted(text, number)
    text = re.split(r"\s#", text, maxsplit=1)[0].rstrip()
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text[0] in _UNREAD or ": " in text or text.startswith("- "):
        raise _LineError(f"line {number}")
    return text


def _quoted(text: str, number: int) -> str:
    inner = text[1:-1]
    if text[0] == "'" and re.fullmatch(r"'([^']|'')*'", text):
        return inner.replace("''", "'")
    try:
        value = json.loads(text)
    except ValueError:
        raise _LineError(f"line {number}") from None
    return str(value)
