"""Tokenizer: text to ids and back, for every tokenizer that a checkpoint folder can hold. Free of torch.

    tokenizer = Tokenizer.load(Path("checkpoints/last"))
    ids = tokenizer.encode("Hello world")

Special tokens (`<|endoftext|>`, `<s>` …) are control tokens: written in a user's text they are plain text, and
decoding leaves them out. A byte-level BPE runs through tiktoken where that provably gives the same ids; bytes and
characters need no library; every other tokenizer.json runs through `tokenizers`.
"""

from __future__ import annotations

import builtins
import hashlib
import logging
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path

from model.errors import TokenizerError
from model.tokenizer.files import (
    CONFIG_FILE,
    END_OF_TEXT,
    TOKENIZER_FILE,
    config_bytes,
    read_tokenizer_files,
    to_json_bytes,
)
from model.tokenizer.parts import (
    PROBES,
    TextCut,
    TokenizerKind,
    TokenizerParts,
    bytes_parts,
    character_parts,
    gpt2_parts,
    parts_from_files,
)
from model.tokenizer.pieces import TokenPieces
from model.tokenizer.stream_decoder import Collector, PlacedCollector, PlainCollector, WindowCollector

__all__ = ["Tokenizer", "TokenizerKind"]

_log = logging.getLogger(__name__)


class Tokenizer:
    """One tokenizer, immutable and safe to share between threads.

    `vocab_size` is the highest id plus one. `special_tokens` maps their texts to their ids.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self.kind: TokenizerKind = parts.kind
        self.special_tokens = dict(parts.special_tokens)
        self.vocab_size = max(parts.pieces.later, default=-1) + 1
        self._parts = parts
        self._special_texts = {i: content.encode() for content, i in parts.special_tokens.items()}

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """GPT-2's tokenizer, from the ranks shipped with this package: 50,257 tokens, `<|endoftext|>` last."""
        return _gpt2()

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Ids 0…255 are the bytes of the UTF-8 text, 256 is `<|endoftext|>`."""
        return cls(bytes_parts({END_OF_TEXT: 256}))

    @classmethod
    def characters(cls, chars: Iterable[str], *, end_of_text: bool = True) -> Tokenizer:
        """The given characters in code point order, and `<|endoftext|>` after them unless switched off.

        `chars` may be a whole text. Raises TokenizerError for items that are not one character of valid Unicode.
        """
        characters = sorted(set(chars))
        for item in characters:
            if len(item) != 1 or "\ud800" <= item <= "\udfff":
                raise TokenizerError("chars must hold single characters without surrogates; give a string of them")
        if not characters:
            raise TokenizerError("chars must hold at least one character; give the text's characters")
        ids = {character: i for i, character in enumerate(characters)}
        return cls(character_parts(ids, {END_OF_TEXT: len(ids)} if end_of_text else {}))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder. Raises TokenizerError, naming the file, for one that cannot be used."""
        return cls.from_file(folder / TOKENIZER_FILE)

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """A tokenizer.json; tokenizer_config.json beside it names the BOS and EOS tokens.

        Raises TokenizerError, naming the file, for one that cannot be used.
        """
        tokenizer = cls(parts_from_files(read_tokenizer_files(path)))
        tokenizer.check_round_trip()
        return tokenizer

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of(self._parts.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of(self._parts.eos_token)

    @property
    def start_token_id(self) -> int | None:
        """What an empty text is continued from: BOS or, where there is none, EOS."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def unk_token_id(self) -> int | None:
        """The token for what the vocabulary lacks; None where there is none."""
        return self._parts.unk_token_id

    @property
    def cut(self) -> TextCut:
        """Where a text may be cut so that the parts, encoded one by one, have the ids of the whole: "anywhere", before
        the last space or line end of "words" that something visible follows, or "never"."""
        return self._parts.cut

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of what decides text and ids: equal for a tokenizer and its saved copy."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self._parts.encoder.canonical()).hexdigest()

    def normalize(self, text: str) -> str:
        """The text as the tokenizer's normaliser leaves it, which is what its ids stand for."""
        _require_unicode(text)
        return self._parts.encoder.normalize(text)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text, in which special tokens are plain text.

        `add_special` lets a tokenizer.json's post-processor add its tokens, as transformers does: Llama's adds BOS.
        GPT-2, bytes and characters add none. Raises TokenizerError for text that the vocabulary cannot express
        (naming the character where there is one) and for lone surrogates.
        """
        _require_unicode(text)
        return self._parts.encoder.encode(text, add_special)

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """`encode` of each text, on several threads where the library can."""
        for text in texts:
            _require_unicode(text)
        return self._parts.encoder.encode_batch(texts, add_special)

    def encode_template(self, text: str) -> list[int]:
        """The ids of a rendered chat template: special tokens written in it become their ids, and none are added."""
        _require_unicode(text)
        return self._parts.encoder.encode_template(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids without special tokens; bytes that are not valid UTF-8 become U+FFFD.

        Raises TokenizerError for an id that is no token.
        """
        collector = self.collector()
        return (collector.push(ids) + collector.finish()).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> builtins.bytes:
        """What a token adds inside a text, or a special token's own text.

        An id without a token (one of a model's padded vocabulary) has no bytes: b"".
        """
        special = self._special_texts.get(token_id)
        return self._parts.pieces.later.get(token_id, b"") if special is None else special

    @property
    def pieces(self) -> TokenPieces | None:
        """What each token adds to a text, by its id; None where only the library can tell."""
        return self._parts.pieces if self._parts.window is None else None

    def collector(self) -> Collector:
        """Gathers the bytes of one text; StreamDecoder turns them into deltas."""
        pieces, window = self._parts.pieces, self._parts.window
        if window is not None:
            return WindowCollector(window, pieces)
        return PlacedCollector(pieces) if pieces.depends_on_place else PlainCollector(pieces.later)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into an existing folder, for `load` and for transformers.

        The files of a tokenizer that came from a folder are written as they were.
        """
        files = self._parts.files or {TOKENIZER_FILE: self._document}
        config = {CONFIG_FILE: config_bytes(self._parts.bos_token, self._parts.eos_token)}
        for name, data in (config | dict(files)).items():
            (folder / name).write_bytes(data)

    @cached_property
    def _document(self) -> builtins.bytes:
        return to_json_bytes(self._parts.encoder.document())  # kept: GPT-2's merges take most of a second

    def check_round_trip(self) -> None:
        """Encode and decode a few texts. Raises TokenizerError where what comes out cannot be right.

        Under the `tokenizers` library text may change (lower case, unknown tokens) or be refused, which is logged.
        """
        if self.kind == "characters":
            return
        for probe in PROBES:
            try:
                ids = self.encode(probe)
            except TokenizerError:
                _log.warning("%s cannot encode some text: it has no token for the unknown", TOKENIZER_FILE)
                return
            if not self._parts.pieces.later.keys() >= set(ids):
                raise TokenizerError(
                    f"{TOKENIZER_FILE} gives ids that its vocabulary lacks; restore it from its source"
                )
            if self.kind != "library" and self.decode(ids) != self.normalize(probe):
                raise TokenizerError(f"{TOKENIZER_FILE} does not give text back as it was; restore that file")

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.special_tokens.get(token)

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"


def _require_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        code_point = ord(text[problem.start])
        raise TokenizerError(f"the text holds the lone surrogate U+{code_point:04X}; send valid Unicode") from None


@cache
def _gpt2() -> Tokenizer:
    return Tokenizer(gpt2_parts())
