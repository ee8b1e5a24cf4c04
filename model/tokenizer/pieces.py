"""What each token adds to the text, as bytes, so that decoding one more token takes constant time.

Most decoders of `tokenizers` are local: a token's text depends on nothing but whether it comes first or last.
Those are turned into tables here. Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.tokenizer.byte_bpe import read_spelling
from model.tokenizer.files import as_dict

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_PREFIX = re.compile(r"\^([#@_]+)")  # of signs that mean themselves in a regular expression

Words = Mapping[int, str]  # the text tokens of a vocabulary by id, as the vocabulary writes them


@dataclass(frozen=True, slots=True)
class TokenPieces:
    """Bytes by token id. Special tokens are listed too and add nothing.

    `first`: what a token adds as the first of the text, where that differs. `owing_space`: tokens after which a
    space comes before the next token, but not at the end. The text loses up to `strip_count` leading `strip`.
    """

    later: Mapping[int, bytes]
    special: frozenset[int] = frozenset()
    first: Mapping[int, bytes] | None = None
    owing_space: frozenset[int] = frozenset()
    strip: bytes = b""
    strip_count: int = 0

    @property
    def depends_on_place(self) -> bool:
        return self.first is not None or bool(self.owing_space) or self.strip_count > 0


def same_everywhere(later: dict[int, bytes], special: Iterable[int]) -> TokenPieces:
    """Pieces that do not depend on their place."""
    special = frozenset(special)
    return TokenPieces(later | dict.fromkeys(special, b""), special)


def local_pieces(
    decoder: object, tokenizer: tokenizers.Tokenizer, words: Words, special: frozenset[int]
) -> TokenPieces | None:
    """The pieces under a tokenizer.json's decoder, or None if that decoder is not known to be local.

    Byte tokens (`<0xE4>`) are the one deviation from the library: in a run of them that is not valid UTF-8 only
    the invalid bytes become U+FFFD, and the characters before them, which a stream has sent already, stay.
    """
    steps = _flatten(decoder)
    kinds = [step.get("type") for step in steps]
    match kinds:
        case []:
            first = {i: token.encode() for i, token in words.items()}
            return _placed(first, {i: b" " + data for i, data in first.items()}, special)
        case ["ByteLevel"]:
            return same_everywhere({i: _read_bytes(token) for i, token in words.items()}, special)
        case ["Metaspace"] | ["WordPiece"]:
            return _probed_pieces(tokenizer, words, special)
        case ["BPEDecoder"]:
            return _word_end_pieces(steps[0].get("suffix"), words, special)
        case _:
            return _fused_pieces(steps, words, special)


def _flatten(decoder: object) -> list[dict[str, object]]:
    """The steps of a decoder, nested sequences laid flat."""
    if decoder is None:
        return []
    entry = as_dict(decoder)
    if entry.get("type") != "Sequence":
        return [entry]
    decoders = entry.get("decoders")
    return [step for inner in decoders for step in _flatten(inner)] if isinstance(decoders, list) else [entry]


def _placed(first: dict[int, bytes], later: dict[int, bytes], special: frozenset[int]) -> TokenPieces:
    empty = dict.fromkeys(special, b"")
    return TokenPieces(later | empty, special, first | empty)


def _read_bytes(token: str) -> bytes:
    data = read_spelling(token)
    return token.encode() if data is None else data  # an added token need not be written in the byte alphabet


def _probed_pieces(tokenizer: tokenizers.Tokenizer, words: Words, special: frozenset[int]) -> TokenPieces:
    """Ask the library's own decoder for each token alone and after another one."""
    decode, anchor = tokenizer.decoder.decode, "x"
    first = {i: decode([token]).encode() for i, token in words.items()}
    later = {i: decode([anchor, token])[len(anchor) :].encode() for i, token in words.items()}
    return _placed(first, later, special)


def _word_end_pieces(suffix: object, words: Words, special: frozenset[int]) -> TokenPieces | None:
    """GPT-1's way: a suffix ends a word and stands for the space before the next one."""
    if not isinstance(suffix, str) or not suffix:
        return None
    if any(suffix in token.removesuffix(suffix) for token in words.values()):
        return None
    later = {i: token.removesuffix(suffix).encode() for i, token in words.items()}
    owing = frozenset(i for i, token in words.items() if token.endswith(suffix))
    return TokenPieces(later | dict.fromkeys(special, b""), special, owing_space=owing)


def _fused_pieces(steps: list[dict[str, object]], words: Words, special: frozenset[int]) -> TokenPieces | None:
    """Llama's chain, and that of word pieces: replacements within a token, byte tokens, all joined, then spaces
    stripped off the start."""
    rest = list(steps)
    replacements = []
    while rest and rest[0].get("type") == "Replace":
        replacement = _replacement(rest.pop(0))
        if replacement is None:
            return None
        replacements.append(replacement)
    has_byte_tokens = bool(rest) and rest[0].get("type") == "ByteFallback"
    kinds = [step.get("type") for step in rest[has_byte_tokens:]]
    if kinds not in (["Fuse"], ["Fuse", "Strip"]):
        return None

    def piece(token: str) -> bytes:
        for replace in replacements:
            token = replace(token)
        byte = _BYTE_TOKEN.fullmatch(token) if has_byte_tokens else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    later = {i: piece(token) for i, token in words.items()} | dict.fromkeys(special, b"")
    if kinds == ["Fuse"]:
        return TokenPieces(later, special)
    content, start, stop = (rest[-1].get(key) for key in ("content", "start", "stop"))
    if not (isinstance(content, str) and len(content.encode()) == 1 and isinstance(start, int) and stop == 0):
        return None
    return TokenPieces(later, special, strip=content.encode(), strip_count=start)


def _replacement(step: dict[str, object]) -> Callable[[str], str] | None:
    """What a Replace step does to a token: everywhere a plain string, or a plain prefix of it (`^##`)."""
    pattern, content = as_dict(step.get("pattern")), step.get("content")
    plain, regex = pattern.get("String"), pattern.get("Regex")
    if not isinstance(content, str):
        return None
    if isinstance(plain, str) and plain:
        return lambda token: token.replace(plain, content)
    prefix = _PREFIX.fullmatch(regex) if isinstance(regex, str) else None
    if prefix is None:
        return None
    return lambda token: content + token.removeprefix(prefix[1]) if token.startswith(prefix[1]) else token
