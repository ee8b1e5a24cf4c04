"""Text to ids: tiktoken, raw bytes, characters, or the `tokenizers` library, behind one protocol.

The libraries are imported when first needed, so that a character or byte tokenizer costs neither. Free of torch.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from model.errors import TokenizerError
from model.tokenizer.byte_bpe import BYTE_ALPHABET, ByteBpe, byte_bpe_document, byte_bpe_model
from model.tokenizer.files import as_dict, special_token_entry, to_json_bytes, tokenizer_document
from model.tokenizer.word_patterns import MANY_CHARACTERS, byte_level, runnable_parts, split_at

if TYPE_CHECKING:
    import tokenizers

IRRELEVANT_PARTS = ("version", "truncation", "padding")  # of a tokenizer.json: they decide no ids of ours
_BATCH_THREADS = min(8, os.cpu_count() or 1)


class Encoder(Protocol):
    """What turns text into ids. Text holds no lone surrogates."""

    def normalize(self, text: str) -> str:
        """The text as it is before it becomes ids."""
        ...

    def encode(self, text: str, add_special: bool) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]: ...

    def encode_template(self, text: str) -> list[int]:
        """Special tokens written in the text become their ids; none are added."""
        ...

    def document(self) -> dict[str, object]:
        """A tokenizer.json that encodes and decodes equally."""
        ...

    def canonical(self) -> bytes:
        """What decides the ids, and nothing else: equal for equal tokenizers."""
        ...


class TiktokenEncoder:
    """Byte-level BPE, after a normalisation and a division into words that `tokenizers` has too."""

    def __init__(self, bpe: ByteBpe) -> None:
        import tiktoken

        self._bpe = bpe
        self._encoding = tiktoken.Encoding(
            "byte_bpe", pat_str=bpe.pattern, mergeable_ranks=bpe.ranks, special_tokens=bpe.special_tokens
        )

    def normalize(self, text: str) -> str:
        return self._bpe.normalizer(text)

    def encode(self, text: str, add_special: bool) -> list[int]:
        text = self._bpe.normalizer(text)
        if len(text) <= MANY_CHARACTERS:
            return self._encoding.encode_ordinary(text)
        return [i for part in runnable_parts(text) for i in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
        if len(texts) < 2 or any(len(text) > MANY_CHARACTERS for text in texts):
            return [self.encode(text, add_special) for text in texts]
        texts = [self._bpe.normalizer(text) for text in texts]
        return self._encoding.encode_ordinary_batch(texts, num_threads=_BATCH_THREADS)

    def encode_template(self, text: str) -> list[int]:
        return _encode_around(self._bpe.special_tokens, text, lambda part: self.encode(part, False))

    def document(self) -> dict[str, object]:
        return byte_bpe_document(self._bpe)

    def canonical(self) -> bytes:
        bpe = self._bpe
        ranks = sorted((i, token.hex()) for token, i in bpe.ranks.items())
        content = {
            "kind": "byte_bpe",
            "pattern": bpe.pattern,
            "ranks": ranks,
            "special": sorted(bpe.special_tokens.items()),
        }
        if bpe.normalizer.steps:
            content["normalizer"] = bpe.normalizer.steps
        return to_json_bytes(content)


def _encode_around(special_tokens: Mapping[str, int], text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of a text in which special tokens become theirs, the longest where several begin at one place."""
    if not special_tokens:
        return encode(text)
    longest_first = sorted(special_tokens, key=len, reverse=True)
    # With the group in the pattern the tokens stand between the parts, at the odd places.
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    ids = [[special_tokens[part]] if place % 2 else encode(part) for place, part in enumerate(parts)]
    return [i for each in ids for i in each]


class _UnitEncoder(ABC):
    """Shared by the two that read a text unit by unit."""

    special_tokens: Mapping[str, int]

    @abstractmethod
    def encode(self, text: str, add_special: bool) -> list[int]: ...

    @abstractmethod
    def document(self) -> dict[str, object]: ...

    def normalize(self, text: str) -> str:
        return text

    def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
        return [self.encode(text, add_special) for text in texts]

    def encode_template(self, text: str) -> list[int]:
        return _encode_around(self.special_tokens, text, lambda part: self.encode(part, False))

    def canonical(self) -> bytes:
        return to_json_bytes(self.document())


class BytesEncoder(_UnitEncoder):
    """Each byte of the UTF-8 text is its own id."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self.special_tokens = special_tokens

    def encode(self, text: str, add_special: bool) -> list[int]:
        return list(text.encode())

    def document(self) -> dict[str, object]:
        return bytes_document(self.special_tokens)


class CharacterEncoder(_UnitEncoder):
    """Each character of the text is an id of a fixed list."""

    def __init__(self, ids: Mapping[str, int], special_tokens: Mapping[str, int]) -> None:
        self._ids = dict(ids)
        self.special_tokens = special_tokens

    def encode(self, text: str, add_special: bool) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as missing:
            code_point = ord(missing.args[0])
            raise TokenizerError(
                f"the text holds the character U+{code_point:04X}, which this model's vocabulary of "
                f"{len(self._ids)} characters lacks; remove it"
            ) from None

    def document(self) -> dict[str, object]:
        return characters_document(self._ids, self.special_tokens)


class LibraryEncoder:
    """Any tokenizer.json, run by `tokenizers` without its truncation and padding, which would lose text."""

    def __init__(self, source: bytes, name: str, special_tokens: Sequence[str] = ()) -> None:
        """`source` is the file's content, `name` its name for errors. `special_tokens`: to be treated so though the
        file does not mark them; unknown ones are left out."""
        self._source = source
        self._name = name
        self._special_tokens = special_tokens
        self._encode_error = f"{name} cannot encode this text; its vocabulary lacks part of it"
        self.tokenizer = self._load()
        self.tokenizer.encode_special_tokens = True  # special tokens in a user's text are text

    def normalize(self, text: str) -> str:
        normalizer = self.tokenizer.normalizer
        with _library_errors(self._encode_error):
            return text if normalizer is None else normalizer.normalize_str(text)

    def encode(self, text: str, add_special: bool) -> list[int]:
        with _library_errors(self._encode_error):
            return self.tokenizer.encode(text, add_special_tokens=add_special).ids

    def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
        with _library_errors(self._encode_error):
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special)
            return [encoding.ids for encoding in encodings]

    def encode_template(self, text: str) -> list[int]:
        with _library_errors(self._encode_error):
            return self._template_tokenizer.encode(text, add_special_tokens=False).ids

    def document(self) -> dict[str, object]:
        return as_dict(json.loads(self._source))  # parsed again when asked for: a large one would fill 100 MB

    def canonical(self) -> bytes:
        return to_json_bytes({k: v for k, v in sorted(self.document().items()) if k not in IRRELEVANT_PARTS})

    @cached_property
    def _template_tokenizer(self) -> tokenizers.Tokenizer:
        return self._load()  # a second one, because the switch for special tokens is shared between threads

    def _load(self) -> tokenizers.Tokenizer:
        import tokenizers

        with _library_errors(f"{self._name} is not a tokenizer that can be run; restore it from its source"):
            tokenizer = tokenizers.Tokenizer.from_str(self._source.decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
            known = [token for token in self._special_tokens if tokenizer.token_to_id(token) is not None]
            tokenizer.add_special_tokens(known)
            return tokenizer


@contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """`tokenizers` raises bare Exception for bad input, and PanicException, a BaseException, for its own faults."""
    try:
        yield
    except Exception as problem:
        raise TokenizerError(message) from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise TokenizerError(message) from problem


def bytes_document(special_tokens: Mapping[str, int]) -> dict[str, object]:
    """Bytes as a byte-level BPE without merges."""
    return tokenizer_document(
        model=byte_bpe_model({spelling: byte for byte, spelling in enumerate(BYTE_ALPHABET)}, []),
        pre_tokenizer=byte_level(use_regex=False),
        decoder=byte_level(use_regex=False),
        added_tokens=[special_token_entry(content, i) for content, i in special_tokens.items()],
    )


def characters_document(ids: Mapping[str, int], special_tokens: Mapping[str, int]) -> dict[str, object]:
    """Characters as a vocabulary of words, each one character long; an unknown one is an error there too."""
    return tokenizer_document(
        model={"type": "WordLevel", "vocab": dict(ids), "unk_token": "<|unknown|>"},
        pre_tokenizer=split_at(r"[\s\S]"),
        decoder={"type": "Fuse"},
        added_tokens=[special_token_entry(content, i) for content, i in special_tokens.items()],
    )
