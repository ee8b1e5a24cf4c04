"""Tokenizer files of a Hugging Face folder: reading what others wrote, and the parts of what we write.

The format is that of the `tokenizers` library (tokenizer.json) and of `transformers` (tokenizer_config.json).
Free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# In tokenizer_config.json, of a vocabulary for which tiktoken and `tokenizers` were seen to differ.
ENCODER_KEY, LIBRARY_ENCODER = "encoder", "tokenizers"
_SPECIAL_MAP_FILE = "special_tokens_map.json"
_COMPANIONS = (CONFIG_FILE, _SPECIAL_MAP_FILE, "chat_template.jinja", "controls.json")
_MAX_BYTES = 128 * 2**20  # the largest published vocabularies take some 35 MB
_BOS_NAMES = (END_OF_TEXT, "<|begin_of_text|>", "<s>", "<bos>")  # tried where no file names the token
_EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer.json with its companions. `raw` holds each file as it was read, by name.

    `needs_library`: tokenizer_config.json says that only `tokenizers` gives the ids that were meant.
    """

    name: str
    raw: Mapping[str, bytes]
    document: dict[str, object]
    special_tokens: dict[str, int]
    bos_token: str | None
    eos_token: str | None
    needs_library: bool


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read a tokenizer.json and, if they lie beside it, tokenizer_config.json and special_tokens_map.json.

    Raises TokenizerError, naming the file, for an absent, oversized or malformed one.
    """
    raw = {TOKENIZER_FILE: _read_bytes(path)}
    for name in _COMPANIONS:
        if (path.parent / name).is_file():
            raw[name] = _read_bytes(path.parent / name)
    document = _parse_object(path.name, raw[TOKENIZER_FILE])
    _check_merges(path.name, as_dict(document.get("model")))
    special_tokens = _read_special_tokens(path.name, document)
    named = {**_parse_companion(_SPECIAL_MAP_FILE, raw), **_parse_companion(CONFIG_FILE, raw)}
    return TokenizerFiles(
        name=path.name,
        raw=raw,
        document=document,
        special_tokens=special_tokens,
        bos_token=_named_token("bos_token", named, special_tokens, _BOS_NAMES),
        eos_token=_named_token("eos_token", named, special_tokens, _EOS_NAMES),
        needs_library=named.get(ENCODER_KEY) == LIBRARY_ENCODER,
    )


def read_config(folder: Path) -> dict[str, object]:
    """A folder's tokenizer_config.json, empty if there is none. Raises TokenizerError for a malformed one."""
    path = folder / CONFIG_FILE
    return _parse_object(path.name, _read_bytes(path)) if path.is_file() else {}


def to_json_bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def config_bytes(
    bos_token: str | None, eos_token: str | None, unk_token: str | None = None, *, needs_library: bool = False
) -> bytes:
    """A tokenizer_config.json that lets transformers run the tokenizer.json as it stands."""
    tokens = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in tokens.items() if token is not None},
        **({ENCODER_KEY: LIBRARY_ENCODER} if needs_library else {}),
    }
    return (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()


def tokenizer_document(
    *, model: dict[str, object], pre_tokenizer: dict[str, object], decoder: dict[str, object],
    added_tokens: list[dict[str, object]], normalizer: dict[str, object] | None = None,
) -> dict[str, object]:  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def special_token_entry(content: str, token_id: int) -> dict[str, object]:
    """One entry of `added_tokens`: a control token, never part of a word."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def as_dict(value: object) -> dict[str, object]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TokenizerError(f"{path.name} is larger than {_MAX_BYTES >> 20} MiB; use a tokenizer's own file")
        return path.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(
            f"{path.name} does not exist in {path.parent.name or 'this folder'}; save the tokenizer there first"
        ) from None
    except OSError as problem:
        raise TokenizerError(f"{path.name} cannot be read: {problem.strerror or 'input/output error'}") from problem


def _parse_object(name: str, data: bytes) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise TokenizerError(f"{name} is not valid JSON; restore it from its source") from problem
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} must hold a JSON object; restore it from its source")
    return value


def _parse_companion(name: str, raw: Mapping[str, bytes]) -> dict[str, object]:
    return _parse_object(name, raw[name]) if name in raw else {}


def _check_merges(name: str, model: dict[str, object]) -> None:
    """Every merge's right half must begin with the prefix of continuing subwords, if there is one: the library cuts
    that many bytes off unseen, and ends the process when the cut falls inside a character."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for merge in merges:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        right = halves[-1] if isinstance(halves, list) and halves else None
        if not isinstance(right, str) or not right.startswith(prefix):
            raise TokenizerError(
                f"{name}: merges do not fit continuing_subword_prefix; restore the file from its source"
            )


def _read_special_tokens(name: str, document: dict[str, object]) -> dict[str, int]:
    """Contents and ids of the added tokens marked special."""
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise TokenizerError(f"{name}: added_tokens must be a list; restore the file from its source")
    result: dict[str, int] = {}
    for entry in map(as_dict, entries):
        content, token_id = entry.get("content"), entry.get("id")
        if not isinstance(content, str) or not isinstance(token_id, int) or isinstance(token_id, bool):
            raise TokenizerError(f"{name}: each of added_tokens needs content and id; restore the file from its source")
        if entry.get("special") is True:
            result[content] = token_id
    return result


def _named_token(
    key: str, named: dict[str, object], special_tokens: dict[str, int], guesses: tuple[str, ...]
) -> str | None:
    """The token that the companions name (a string, or an object with `content`), else a customary special one."""
    if named:
        value = named.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        return content if isinstance(content, str) else None
    return next((guess for guess in guesses if guess in special_tokens), None)
