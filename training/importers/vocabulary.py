"""The tokenizer that belongs to an imported model: GPT-2's, one in a file, or the characters it was trained on.

A character vocabulary comes as the text it was taken from (nanoGPT's rule: the sorted set of its characters) or as
JSON: a list in the order of the ids, or an object with `stoi` ({character: id}) or `itos` ({id: character}), as
nanoGPT keeps them in meta.pkl, which is pickle and never read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from model.errors import TokenizerError
from model.json_file import MAX_JSON_BYTES
from model.tokenizer import Tokenizer
from model.tokenizer.parts import character_parts
from training.errors import RecipeError

_PICKLES = (".pkl", ".pickle")
_CHUNK = 1 << 20


def named_tokenizer(name: str) -> Tokenizer:
    """`gpt2`, or a tokenizer.json or a folder that holds one. Raises RecipeError or TokenizerError."""
    if name == "gpt2":
        return Tokenizer.gpt2()
    path = Path(name)
    if not path.exists():
        raise RecipeError(f"--tokenizer {name}: neither gpt2 nor an existing path")
    return Tokenizer.load(path) if path.is_dir() else Tokenizer.from_file(path)


def character_tokenizer(path: Path) -> Tokenizer:
    """One token for each character, and no other. Raises TokenizerError, naming the file."""
    if path.suffix in _PICKLES:
        raise TokenizerError(
            f"{path} is pickle, which is never read; give the text that the model was trained on, or write its stoi "
            "as JSON"
        )
    try:
        ids = _from_json(path) if path.suffix == ".json" else _from_text(path)
    except UnicodeDecodeError:
        raise TokenizerError(f"{path} is not UTF-8 text; give the text or a .json file of the characters") from None
    except OSError as problem:
        raise TokenizerError(f"{path} cannot be read: {problem.strerror}") from None
    if not ids:
        _fail(path, "is empty")
    if sorted(ids.values()) != list(range(len(ids))):
        _fail(path, "must give each character its own id, counted from 0 without gaps")
    if any(len(char) != 1 or "\ud800" <= char <= "\udfff" for char in ids):
        _fail(path, "must hold single characters without surrogates")
    return Tokenizer(character_parts(ids, {}))


def _from_text(path: Path) -> dict[str, int]:
    """In code point order. Line ends are read as nanoGPT reads them: all of them are newlines."""
    characters: set[str] = set()
    with path.open(encoding="utf-8") as file:
        while chunk := file.read(_CHUNK):
            characters.update(chunk)
    return {char: i for i, char in enumerate(sorted(characters))}


def _from_json(path: Path) -> dict[str, int]:
    if path.stat().st_size > MAX_JSON_BYTES:
        _fail(path, f"is larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError):
        _fail(path, "is not valid JSON")
    if isinstance(value, dict) and isinstance(value.get("stoi"), dict):
        pairs = [(char, token_id) for char, token_id in value["stoi"].items()]
    elif isinstance(value, dict) and isinstance(value.get("itos"), dict):
        pairs = [(char, int(key) if key.isdecimal() else None) for key, char in value["itos"].items()]
    elif isinstance(value, dict) and isinstance(value.get("itos"), list):
        pairs = [(char, token_id) for token_id, char in enumerate(value["itos"])]
    elif isinstance(value, list):
        pairs = [(char, token_id) for token_id, char in enumerate(value)]
    else:
        _fail(path, "must hold a list of characters, or an object with stoi or itos")
    if not all(isinstance(char, str) and type(token_id) is int for char, token_id in pairs):
        _fail(path, "must map characters to ids")
    ids = dict(pairs)
    if len(ids) != len(pairs):
        _fail(path, "names a character twice")
    return ids


def _fail(path: Path, rule: str) -> NoReturn:
    raise TokenizerError(f"{path} {rule}; give the text that the model was trained on, or its characters as JSON")
