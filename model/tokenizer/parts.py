"""Choosing what runs a tokenizer: its encoder, the bytes of its tokens and its control tokens. Free of torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from model.tokenizer.byte_bpe import ByteBpe, byte_bpe_from_document, load_gpt2
from model.tokenizer.encoders import (
    IRRELEVANT_PARTS,
    BytesEncoder,
    CharacterEncoder,
    Encoder,
    LibraryEncoder,
    TiktokenEncoder,
    bytes_document,
    characters_document,
)
from model.tokenizer.files import END_OF_TEXT, TOKENIZER_FILE, TokenizerFiles, as_dict
from model.tokenizer.normalizer import read_normalizer
from model.tokenizer.pieces import TokenPieces, local_pieces, same_everywhere
from model.tokenizer.word_patterns import WORD_PATTERNS, split_at

if TYPE_CHECKING:
    import tokenizers

TokenizerKind = Literal["byte_bpe", "bytes", "characters", "library"]

# At any place; before a space or line end that something visible follows; nowhere.
TextCut = Literal["anywhere", "words", "never"]

_log = logging.getLogger(__name__)

# Letters, contractions, digits, runs of spaces, characters of two to four bytes, and text like special tokens.
PROBES = (
    "Hello world, it's 42.",
    "  don't\tWE'LL  1234567 --\n\n x_y ",
    "naïve नमस्ते 日本語 👩‍🚀 \u00a0\u3000\x00\x7f",
    "<|endoftext|> <s> </s> a<b>c",
)


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """`window` is set where only the library can decode. `files` are those the tokenizer was read from, by name.

    `bos_token` and `eos_token` are the texts of special tokens. `unk_token_id` stands for what the vocabulary lacks.
    `cut` says where a text may be cut so that its parts have the ids of the whole.
    """

    kind: TokenizerKind
    encoder: Encoder
    pieces: TokenPieces
    special_tokens: Mapping[str, int]
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token_id: int | None = None
    cut: TextCut = "never"
    files: Mapping[str, bytes] | None = None
    window: tokenizers.Tokenizer | None = None


def gpt2_parts() -> TokenizerParts:
    return replace(_byte_bpe_parts(load_gpt2()), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def bytes_parts(special_tokens: Mapping[str, int]) -> TokenizerParts:
    pieces = same_everywhere({byte: bytes([byte]) for byte in range(256)}, special_tokens.values())
    token = next(iter(special_tokens), None)
    return TokenizerParts("bytes", BytesEncoder(special_tokens), pieces, special_tokens, token, token, cut="anywhere")


def character_parts(ids: Mapping[str, int], special_tokens: Mapping[str, int]) -> TokenizerParts:
    pieces = same_everywhere({i: char.encode() for char, i in ids.items()}, special_tokens.values())
    token = next(iter(special_tokens), None)
    encoder = CharacterEncoder(ids, special_tokens)
    return TokenizerParts("characters", encoder, pieces, special_tokens, token, token, cut="anywhere")


def parts_from_files(files: TokenizerFiles) -> TokenizerParts:
    """The lightest of the encoders that gives exactly what the files say. Raises TokenizerError for broken ones."""
    parts = _unit_parts(files) or _tiktoken_parts(files) or _library_parts(files)
    return replace(
        parts,
        bos_token=_known("bos_token", files.bos_token, parts.special_tokens),
        eos_token=_known("eos_token", files.eos_token, parts.special_tokens),
        files=files.raw,
    )


def _byte_bpe_parts(bpe: ByteBpe) -> TokenizerParts:
    pieces = same_everywhere({i: token for token, i in bpe.ranks.items()}, bpe.special_tokens.values())
    cut: TextCut = "words" if bpe.normalizer.is_compatible else "never"
    return TokenizerParts("byte_bpe", TiktokenEncoder(bpe), pieces, bpe.special_tokens, cut=cut)


def _unit_parts(files: TokenizerFiles) -> TokenizerParts | None:
    """Bytes or characters, if the file says just what `Tokenizer.save` writes for them."""
    special_tokens = files.special_tokens
    if _is_same(files.document, bytes_document(special_tokens)):
        return bytes_parts(special_tokens)
    vocab = as_dict(as_dict(files.document.get("model")).get("vocab"))
    ids = {char: i for char, i in vocab.items() if len(char) == 1 and type(i) is int}
    all_ids = [*ids.values(), *special_tokens.values()]
    if not ids or len(ids) != len(vocab) or sorted(all_ids) != list(range(len(all_ids))):
        return None
    is_ours = _is_same(files.document, characters_document(ids, special_tokens))
    return character_parts(ids, special_tokens) if is_ours else None


def _is_same(left: dict[str, object], right: dict[str, object]) -> bool:
    return all(left.get(key) == right.get(key) for key in left.keys() | right.keys() if key not in IRRELEVANT_PARTS)


def _tiktoken_parts(files: TokenizerFiles) -> TokenizerParts | None:
    bpe = None if files.needs_library else byte_bpe_from_document(files.document)
    if bpe is None:
        return None
    parts = _byte_bpe_parts(bpe)
    if not bpe.is_gpt2:
        library = _library_encoder(files)
        if any(parts.encoder.encode(probe, False) != library.encode(probe, False) for probe in PROBES):
            _log.warning("%s differs between tiktoken and tokenizers; using tokenizers", files.name)
            return None
    return parts


def _library_encoder(files: TokenizerFiles) -> LibraryEncoder:
    named = [token for token in (files.bos_token, files.eos_token) if token is not None]
    return LibraryEncoder(files.raw[TOKENIZER_FILE], files.name, named)


def _library_parts(files: TokenizerFiles) -> TokenizerParts:
    encoder = _library_encoder(files)
    vocab = encoder.tokenizer.get_vocab(with_added_tokens=True)
    named = (token for token in (files.bos_token, files.eos_token) if token in vocab)
    special_tokens = files.special_tokens | {token: vocab[token] for token in named if token is not None}
    special_ids = frozenset(special_tokens.values())
    words = {i: token for token, i in vocab.items() if i not in special_ids}
    pieces = local_pieces(files.document.get("decoder"), encoder.tokenizer, words, special_ids)
    window = None
    if pieces is None:
        pieces = same_everywhere({i: token.encode() for i, token in words.items()}, special_ids)
        window = encoder.tokenizer
    unk_token_id = _unknown_id(as_dict(files.document.get("model")), vocab)
    cut: TextCut = "words" if _begins_words_at_spaces(files.document) else "never"
    return TokenizerParts("library", encoder, pieces, special_tokens, unk_token_id=unk_token_id, cut=cut, window=window)


def _begins_words_at_spaces(document: dict[str, object]) -> bool:
    """Whether the first step divides a text by one of the known patterns, and nothing sees more than a word."""
    normalizer = read_normalizer(document.get("normalizer"))
    steps = as_dict(document.get("pre_tokenizer")).get("pretokenizers")
    first = steps[0] if isinstance(steps, list) and steps else None
    return (
        normalizer is not None
        and normalizer.is_compatible
        and document.get("post_processor") is None
        and any(first == split_at(pattern) for pattern in WORD_PATTERNS.values())
        and all(as_dict(entry).get("special") for entry in _entries(document.get("added_tokens")))
    )


def _entries(added_tokens: object) -> list[object]:
    return added_tokens if isinstance(added_tokens, list) else []


def _unknown_id(model: dict[str, object], vocab: Mapping[str, int]) -> int | None:
    """WordPiece, WordLevel and BPE name the token, Unigram its id."""
    token, token_id = model.get("unk_token"), model.get("unk_id")
    if isinstance(token, str):
        return vocab.get(token)
    return token_id if type(token_id) is int else None


def _known(key: str, token: str | None, special_tokens: Mapping[str, int]) -> str | None:
    if token is None or token in special_tokens:
        return token
    _log.warning("%s names %r, which is not in the vocabulary; going on without it", key, token)
    return None
