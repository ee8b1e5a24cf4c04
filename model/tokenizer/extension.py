"""A tokenizer with more tokens behind its vocabulary: the ids of the old ones stay. Free of torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import TokenizerError
from model.tokenizer.files import TOKENIZER_FILE, special_token_entry, to_json_bytes
from model.tokenizer.tokenizer import Tokenizer


def extend_tokenizer(
    base: Tokenizer, *, special: Sequence[str] = (), text: Sequence[str] = (), files: Mapping[str, bytes] | None = None
) -> Tokenizer:
    """`base` with these tokens behind its own, special ones first; those that it has already keep their ids.

    Special tokens are control tokens, which no text produces; a text token is matched whole wherever it stands in a
    text, before anything else is, as transformers' `add_tokens` does. `files` are companions by name that lie beside
    the tokenizer's own from then on. Raises TokenizerError for a token that cannot be added.
    """
    new_special = [token for token in dict.fromkeys(special) if token not in base.special_tokens]
    new_text = [token for token in dict.fromkeys(text) if not _is_one_token(base, token)]
    with tempfile.TemporaryDirectory(prefix="quill-tokenizer-") as name:
        folder = Path(name)
        document = _save(base, folder)
        ids = {token: base.vocab_size + place for place, token in enumerate([*new_special, *new_text])}
        entries = [special_token_entry(token, ids[token]) for token in new_special]
        entries += [special_token_entry(token, ids[token]) | {"special": False} for token in new_text]
        document["added_tokens"] = [*(document.get("added_tokens") or []), *entries]
        tokenizer = _load(folder, document, files or {})
    for token in new_special:
        _require(tokenizer.encode_template(token) == [ids[token]], token)
    for token in new_text:
        _require(tokenizer.encode(token, add_special=False) == [ids[token]], token)
        _require(tokenizer.decode([ids[token]]) == token, token)
    return tokenizer


def is_extension(tokenizer: Tokenizer, base: Tokenizer) -> bool:
    """Whether `tokenizer` is `base`, or becomes it when added tokens behind its vocabulary are left out."""
    if tokenizer.vocab_size <= base.vocab_size:
        return tokenizer.digest == base.digest
    with tempfile.TemporaryDirectory(prefix="quill-tokenizer-") as name:
        document = _save(tokenizer, Path(name))
        entries: Iterable[Any] = document.get("added_tokens") or []
        document["added_tokens"] = [entry for entry in entries if entry["id"] < base.vocab_size]
        alone = Path(name) / "alone"  # without companions, which may name tokens that are left out
        alone.mkdir()
        try:
            return _load(alone, document, {}).digest == base.digest
        except TokenizerError:  # the old tokens are others, and name one that is gone
            return False


def _save(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """The tokenizer's files in the folder; its tokenizer.json is returned."""
    tokenizer.save(folder)
    document: dict[str, Any] = json.loads((folder / TOKENIZER_FILE).read_bytes())
    return document


def _load(folder: Path, document: dict[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    for name, data in {TOKENIZER_FILE: to_json_bytes(document), **files}.items():
        (folder / name).write_bytes(data)
    return Tokenizer.load(folder)


def _is_one_token(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return len(tokenizer.encode(text, add_special=False)) == 1
    except TokenizerError:  # a character that it lacks
        return False


def _require(works: bool, token: str) -> None:
    if not works:
        raise TokenizerError(
            f"the token {token!r} cannot be added, for this kind of tokenizer would not read it back; leave it out"
        )
