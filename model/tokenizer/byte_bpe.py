"""Byte-level BPE as tiktoken runs it: ranks, their merges, and the proof that a tokenizer.json means the same.

A rank table gives each byte string one number that is both its id and its merge priority. A tokenizer.json lists
the merges instead. `split_pair` turns ranks into merges; `byte_bpe_from_document` goes the other way and refuses
every file for which the two could ever disagree. Free of torch.
"""

from __future__ import annotations

import binascii
import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

from model.errors import TokenizerError
from model.tokenizer.files import END_OF_TEXT, as_dict, special_token_entry, tokenizer_document
from model.tokenizer.normalizer import NO_NORMALIZER, Normalizer, read_normalizer
from model.tokenizer.word_patterns import GPT2_PATTERN, byte_level, byte_level_words, read_byte_level_words

_GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_GPT2_MERGES_SHA256 = "799bad94dfb8121611c4ac25d4615f2a768e2c04dbf564cba0779021a5116fc2"
_MAX_TOKEN_BYTES = 256  # the proof simulates each token, in time that grows with the square of its length
_MAX_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ByteBpe:
    """`ranks` holds every mergeable token; `special_tokens` are control tokens that text never produces.

    Text is normalised, then divided into words by `pattern`, one of `word_patterns`.
    """

    ranks: dict[bytes, int]
    special_tokens: dict[str, int]
    is_gpt2: bool = False
    pattern: str = GPT2_PATTERN
    normalizer: Normalizer = NO_NORMALIZER


def _make_alphabet() -> str:
    """GPT-2's printable stand-in for each byte 0…255: itself if visible in Latin-1, else a letter from U+0100 on."""
    stand_ins = iter(range(256, 512))
    return "".join(chr(b) if chr(b).isprintable() and b != 0x20 else chr(next(stand_ins)) for b in range(256))


BYTE_ALPHABET = _make_alphabet()
_TO_STAND_INS = dict(enumerate(BYTE_ALPHABET))
_OUTSIDE = 0xFFFF  # no Latin-1 character, so that encoding fails
_TO_BYTE_VALUES = dict.fromkeys(range(256), _OUTSIDE) | {ord(c): b for b, c in enumerate(BYTE_ALPHABET)}


def spell_bytes(token: bytes) -> str:
    """A token's bytes in the printable alphabet, as tokenizer.json writes them."""
    return token.decode("latin-1").translate(_TO_STAND_INS)


def read_spelling(spelling: str) -> bytes | None:
    """The bytes behind a spelling, or None if it is not written in the alphabet."""
    try:
        return spelling.translate(_TO_BYTE_VALUES).encode("latin-1")
    except UnicodeEncodeError:
        return None


def load_gpt2() -> ByteBpe:
    """GPT-2's 50,256 ranks, from the file shipped with the package, and `<|endoftext|>`."""
    path = Path(__file__).parent.parent / "data" / "gpt2.tiktoken"
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != _GPT2_RANKS_SHA256:
        raise TokenizerError(f"{path.name} of this installation is missing or damaged; install the package again")
    pairs = (line.split() for line in data.splitlines())
    ranks = {binascii.a2b_base64(token): int(rank) for token, rank in pairs}
    return ByteBpe(ranks, {END_OF_TEXT: len(ranks)}, is_gpt2=True)


def split_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last merge that builds `token` when only lower ranks may merge, or None if they do not reach it."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(candidates)
        if best == limit:
            return None
        at = candidates.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_bpe_document(bpe: ByteBpe) -> dict[str, object]:
    """The tokenizer.json of these ranks: the same ids for every text.

    Raises TokenizerError for ranks that no list of merges can express.
    """
    tokens = sorted(bpe.ranks, key=bpe.ranks.__getitem__)
    merges = []
    for token in tokens:
        if len(token) > 1:
            pair = split_pair(token, bpe.ranks)
            if pair is None:
                raise TokenizerError("these ranks hold a token that no merges build; save the original files instead")
            merges.append([spell_bytes(pair[0]), spell_bytes(pair[1])])
    return tokenizer_document(
        model=byte_bpe_model({spell_bytes(token): bpe.ranks[token] for token in tokens}, merges),
        pre_tokenizer=byte_level_words(bpe.pattern),
        decoder=byte_level(use_regex=True),
        added_tokens=[special_token_entry(content, i) for content, i in bpe.special_tokens.items()],
        normalizer=bpe.normalizer.document(),
    )


def byte_bpe_model(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, object]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def byte_bpe_from_document(document: dict[str, object]) -> ByteBpe | None:
    """The ranks of a GPT-2-style tokenizer.json if tiktoken provably gives the same ids for every text, else None.

    Both algorithms merge the lowest-ranked adjacent pair, leftmost first; tiktoken joins any two neighbours whose
    concatenation is a token, while the file allows only listed pairs. They agree everywhere if each token's own
    bytes, merged by lower ranks alone, end in exactly the pair that the file lists for it: inside any word the
    merges within a span are the same as for the span alone, so no other pair ever comes to stand there.
    """
    model = as_dict(document.get("model"))
    pattern = read_byte_level_words(document.get("pre_tokenizer"))
    normalizer = read_normalizer(document.get("normalizer"))
    if pattern is None or normalizer is None or not _is_plain_byte_level(document, model):
        return None
    special_tokens = _special_tokens(document.get("added_tokens"))
    vocab = as_dict(model.get("vocab"))
    if special_tokens is None or (model.get("ignore_merges") and not special_tokens.keys().isdisjoint(vocab)):
        return None
    mergeable = {spelling: i for spelling, i in vocab.items() if special_tokens.get(spelling) != i}
    tokens = _read_tokens(mergeable, special_tokens)
    merges = _read_merges(model.get("merges"), tokens)
    if tokens is None or merges is None:
        return None
    ranks = {token: i for token, i in zip(tokens.values(), mergeable.values(), strict=True) if _is_id(i)}
    merged = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    if len(ranks) - len(merged) != 256 or merged != [left + right for left, right in merges]:
        return None
    is_gpt2 = _digest(merges) == _GPT2_MERGES_SHA256
    if not is_gpt2 and any(split_pair(token, ranks) != pair for token, pair in zip(merged, merges, strict=True)):
        return None
    return ByteBpe(ranks, special_tokens, is_gpt2, pattern, normalizer)


def _is_plain_byte_level(document: dict[str, object], model: dict[str, object]) -> bool:
    """Whether what merges and decodes is as GPT-2 has it (parts that change no ids and no text are free)."""
    post_processor = document.get("post_processor")
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and model.get("unk_token") is None
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not model.get("byte_fallback")
        and (post_processor is None or as_dict(post_processor).get("type") == "ByteLevel")
        and as_dict(document.get("decoder")).get("type") == "ByteLevel"
    )


def _special_tokens(added_tokens: object) -> dict[str, int] | None:
    """Contents and ids of the added tokens, or None if one of them takes part in reading ordinary text."""
    if not isinstance(added_tokens, list):
        return None
    result: dict[str, int] = {}
    for entry in map(as_dict, added_tokens):
        content, token_id = entry.get("content"), entry.get("id")
        is_bare = not (entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"))
        if not (entry.get("special") is True and is_bare and isinstance(content, str) and content):
            return None
        if not _is_id(token_id) or content in result:
            return None
        result[content] = token_id
    return result


def _read_tokens(vocab: dict[str, object], special_tokens: dict[str, int]) -> dict[str, bytes] | None:
    """The bytes behind each spelling, or None if a token or an id cannot be tiktoken's."""
    ids = [*vocab.values(), *special_tokens.values()]
    if not all(map(_is_id, ids)) or len(set(ids)) < len(ids):
        return None
    tokens: dict[str, bytes] = {}
    for spelling in vocab:
        token = read_spelling(spelling)
        if not token or len(token) > _MAX_TOKEN_BYTES:
            return None
        tokens[spelling] = token
    return tokens


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_ID


def _read_merges(value: object, tokens: dict[str, bytes] | None) -> list[tuple[bytes, bytes]] | None:
    """Merges in either notation, "left right" or ["left", "right"], as bytes; both halves must be tokens."""
    if not isinstance(value, list) or tokens is None:
        return None
    merges = []
    for entry in value:
        halves = entry.split(" ") if isinstance(entry, str) else entry
        try:
            left, right = halves
            merges.append((tokens[left], tokens[right]))
        except (TypeError, ValueError, KeyError):
            return None
    return merges


def _digest(merges: list[tuple[bytes, bytes]]) -> str:
    """Names a list of merges. GPT-2's is known to pass the proof, which takes a third of a second."""
    lines = "\n".join(f"{left.hex()} {right.hex()}" for left, right in merges)
    return hashlib.sha256(lines.encode()).hexdigest()
