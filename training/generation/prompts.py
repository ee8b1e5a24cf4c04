"""Prompts: from text to ids, and from a file to many. Free of torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model.tokenizer import Tokenizer
from training.errors import DataError, RecipeError

_ROW_SUFFIXES = (".jsonl", ".ndjson")
STDIN = Path("-")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, and the file and line from which it came; None for the option --prompt."""

    text: str
    place: str | None = None


class _Row(msgspec.Struct):
    prompt: str


def prompt_ids(tokenizer: Tokenizer, prompt: str, prefix: Sequence[int] = ()) -> list[int]:
    """The ids to continue. Those of control tokens come first, as in training; else an empty prompt starts from the
    BOS token or, where there is none, the end-of-text token. Raises RecipeError where there is neither."""
    if prefix:
        return [*prefix, *tokenizer.encode(prompt, add_special=False)]
    ids = tokenizer.encode(prompt)
    if not ids:
        start = tokenizer.start_token_id
        if start is None:
            raise RecipeError("--prompt is empty and the tokenizer has no end-of-text token to start from")
        ids = [start]
    return ids


def read_prompts(path: Path) -> list[Prompt]:
    """A prompt from each line that is not blank; of a .jsonl file from the field `prompt`, which may be empty.

    `-` reads the standard input's lines. Raises DataError, naming the file and line, for what is no prompt.
    """
    data = sys.stdin.buffer.read() if path == STDIN else _read(path)
    origin = "standard input" if path == STDIN else str(path)
    is_rows = path.suffix.lower() in _ROW_SUFFIXES
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    prompts = [
        _row(line, f"{origin}, line {number}") if is_rows else _line(line, f"{origin}, line {number}")
        for number, line in lines
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{origin}: holds no prompts; write one on each line")
    return prompts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a file of prompts") from None


def _line(line: bytes, place: str) -> Prompt:
    try:
        return Prompt(line.removesuffix(b"\r").decode(), place)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text; convert the file first") from None


def _row(line: bytes, place: str) -> Prompt:
    try:
        return Prompt(msgspec.json.decode(line, type=_Row).prompt, place)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f'{place}: not an object with a text "prompt" ({error}); write {{"prompt": "…"}}') from None
