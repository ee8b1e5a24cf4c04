"""Vocabularies out of text: each function gives a tokenizer.json. Free of torch.

The `tokenizers` library counts and merges: byte-level BPE as in GPT-2 (Radford et al., 2019) after Sennrich et al.
(2016), and word pieces as in BERT (Devlin et al., 2019) after Schuster and Nakajima (2012). The same text gives the
same file, byte for byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.tokenizer.byte_bpe import byte_bpe_model, spell_bytes
from model.tokenizer.encoders import bytes_document, characters_document
from model.tokenizer.files import END_OF_TEXT, special_token_entry, tokenizer_document
from model.tokenizer.normalizer import Normalizer
from model.tokenizer.word_patterns import WORD_PATTERNS, byte_level, byte_level_words, split_at
from training.errors import RecipeError

if TYPE_CHECKING:
    import tokenizers

Kind = Literal["bpe", "wordpiece", "char", "bytes"]
Pretokenizer = Literal["gpt2", "devanagari", "whitespace"]

UNKNOWN = "[UNK]"
_PREFIX = "##"
# Longer ones, such as lines of dashes, would only fill the vocabulary.
_MAX_TOKEN_CHARACTERS = 32
# BERT's bound: a longer word is unknown, because its pieces take time that grows with the square of its length.
_MAX_WORD_CHARACTERS = 100
# Each sign stands alone, so that no word begins with the prefix, and none is a special token's text.
_SIGNS = r"[\p{P}\p{S}][\p{M}\x{200c}\x{200d}]*+"
# Each character takes two word pieces, one that begins a word and one that continues it.
_MAX_ALPHABET_SHARE = 3

Document = dict[str, object]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to learn a vocabulary of at most `vocab_size` tokens, `special_tokens` among them. `min_frequency`: how often
    a pair must occur to be joined."""

    kind: Kind
    vocab_size: int
    pretokenizer: Pretokenizer
    normalizer: Normalizer
    special_tokens: tuple[str, ...]
    min_frequency: int

    @property
    def pattern(self) -> str:
        return WORD_PATTERNS[self.pretokenizer]

    def require_size(self, least: int, what: str) -> None:
        if self.vocab_size < least:
            raise RecipeError(f"--vocab-size is {self.vocab_size} but must be at least {least}: {what}")


def learn(plan: Plan, read: Callable[[str], Iterable[str]], on_notice: Callable[[str], None]) -> Document:
    """The tokenizer.json. `read` gives the texts and may be called several times, with what is being done.

    Raises RecipeError for a vocabulary too small for what it must hold.
    """
    match plan.kind:
        case "bytes":
            return _learn_bytes(plan)
        case "char":
            return _learn_characters(plan, _count_characters(plan, read))
        case "bpe":
            return _learn_bpe(plan, _count_characters(plan, read), read("counting words"))
        case "wordpiece":
            alphabet = _alphabet(plan, _count_characters(plan, read), on_notice)
            return _learn_word_pieces(plan, alphabet, read("counting words"))


def _learn_bytes(plan: Plan) -> Document:
    plan.require_size(256 + len(plan.special_tokens), "256 bytes and the special tokens")
    special = {token: 256 + place for place, token in enumerate(plan.special_tokens)}
    return bytes_document(special) | {"normalizer": plan.normalizer.document()}


def _learn_characters(plan: Plan, counts: Counter[str]) -> Document:
    plan.require_size(len(counts) + len(plan.special_tokens), "the text's characters and the special tokens")
    ids = {character: i for i, character in enumerate(sorted(counts))}
    special = {token: len(ids) + place for place, token in enumerate(plan.special_tokens)}
    return characters_document(ids, special) | {"normalizer": plan.normalizer.document()}


def _learn_bpe(plan: Plan, counts: Counter[str], texts: Iterable[str]) -> Document:
    """Byte-level BPE whose first merges build the text's characters, so that its tokens hold whole ones.

    Pairs are then counted over characters. Counted over bytes, as GPT-2's, many tokens of scripts beyond Latin end
    within a character: what a model writes could be shown only a token later, and a text that ends there is damaged.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    plan.require_size(256 + len(plan.special_tokens), "256 bytes and the special tokens")
    tokens = [*(bytes([byte]) for byte in range(256))]
    merges = _character_merges(counts, plan.vocab_size - len(plan.special_tokens) - len(tokens))
    tokens += [left + right for left, right in merges]
    alphabet = [character for character in counts if character.encode() in set(tokens)]
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + plan.vocab_size - len(plan.special_tokens) - len(tokens),
        min_frequency=plan.min_frequency, limit_alphabet=len(alphabet), initial_alphabet=alphabet,
        max_token_length=_MAX_TOKEN_CHARACTERS, show_progress=False,
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(plan.pattern), "isolated")
    tokenizer.train_from_iterator(map(plan.normalizer, texts), trainer)
    known = set(tokens)
    for left, right in _read_model(tokenizer)[1]:
        pair = (left.encode(), right.encode())
        if (token := b"".join(pair)) not in known:  # two pairs may join to one text
            known.add(token)
            tokens.append(token)
            merges.append(pair)
    spellings = list(map(spell_bytes, tokens))
    if clash := set(spellings) & set(plan.special_tokens):
        raise special_token_clash(clash.pop())
    vocab = {token: place for place, token in enumerate([*plan.special_tokens, *spellings])}
    return tokenizer_document(
        model=byte_bpe_model(vocab, [[spell_bytes(left), spell_bytes(right)] for left, right in merges]),
        pre_tokenizer=byte_level_words(plan.pattern),
        decoder=byte_level(use_regex=True),
        added_tokens=_special_entries(vocab, plan.special_tokens),
        normalizer=plan.normalizer.document(),
    )


def _character_merges(counts: Counter[str], room: int) -> list[tuple[bytes, bytes]]:
    """The merges that build characters of several bytes, the most frequent first, as far as three quarters of the room
    go: of a character of three bytes the first two, which its neighbours share, then the third."""
    merges: dict[bytes, tuple[bytes, bytes]] = {}
    for character in sorted(counts, key=lambda character: (-counts[character], character)):
        data = character.encode()
        new = {data[:end]: (data[: end - 1], data[end - 1 : end]) for end in range(2, len(data) + 1)}
        if len(merges | new) > room * 3 // 4:
            break
        merges |= new
    return [merges[token] for token in sorted(merges, key=lambda token: (len(token), token))]


def _learn_word_pieces(plan: Plan, alphabet: Sequence[str], texts: Iterable[str]) -> Document:
    """BERT's word pieces, except that a word holds the space before it, so that text comes back as it was."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    special = (*plan.special_tokens, UNKNOWN)
    characters = [*alphabet, *(_PREFIX + character for character in alphabet)]
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    # Named beforehand, characters have their place in an order, which the trainer would take from a hash table.
    trainer = trainers.WordPieceTrainer(
        vocab_size=plan.vocab_size, min_frequency=plan.min_frequency, special_tokens=[*special, *characters],
        limit_alphabet=len(alphabet), initial_alphabet=list(alphabet), show_progress=False,
        continuing_subword_prefix=_PREFIX,
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(plan.pattern), "isolated"), pre_tokenizers.Split(Regex(_SIGNS), "isolated"),
    ])  # fmt: skip
    tokenizer.train_from_iterator(map(plan.normalizer, texts), trainer)
    vocab, _ = _read_model(tokenizer)
    return tokenizer_document(
        model={
            "type": "WordPiece",
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": _PREFIX,
            "max_input_chars_per_word": _MAX_WORD_CHARACTERS,
            "vocab": vocab,
        },
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split_at(plan.pattern), split_at(_SIGNS)]},
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"Regex": f"^{_PREFIX}"}, "content": ""},
                {"type": "Fuse"},
            ],
        },
        added_tokens=_special_entries(vocab, special),
        normalizer=plan.normalizer.document(),
    )


def _count_characters(plan: Plan, read: Callable[[str], Iterable[str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in read("counting characters"):
        counts.update(plan.normalizer(text))
    return counts


def _alphabet(plan: Plan, counts: Counter[str], on_notice: Callable[[str], None]) -> list[str]:
    """The characters that get word pieces: all, or the most frequent if they would fill the vocabulary."""
    num_special = len(plan.special_tokens) + 1
    room = (plan.vocab_size - num_special) // _MAX_ALPHABET_SHARE
    plan.require_size(num_special + _MAX_ALPHABET_SHARE, "the special tokens and something beside them")
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    if len(kept) < len(counts):
        share = 1 - sum(counts[character] for character in kept) / counts.total()
        on_notice(
            f"{len(counts) - len(kept)} of {len(counts)} characters, {share:.2%} of the text, become {UNKNOWN}; "
            f"a larger --vocab-size has room for them"
        )
    return sorted(kept)


def _read_model(tokenizer: tokenizers.Tokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """The vocabulary in the order of its ids, and the merges."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    return vocab, [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]


def _special_entries(vocab: dict[str, int], special: Sequence[str]) -> list[Document]:
    return [special_token_entry(token, vocab[token]) for token in special]


def special_tokens(extra: Sequence[str]) -> tuple[str, ...]:
    """`<|endoftext|>` and the others. Raises RecipeError for one that cannot be a special token."""
    for token in extra:
        if not token.strip() or not token.isprintable() or len(token) < 2:
            raise RecipeError(f"--special {token!r} must be printable text of two characters or more, such as <|user|>")
        if token == UNKNOWN:
            raise RecipeError(f"--special {UNKNOWN} is the mark of the unknown; choose another name")
    return tuple(dict.fromkeys((END_OF_TEXT, *extra)))


def special_token_clash(token: str) -> RecipeError:
    """Ordinary text would become the special token."""
    return RecipeError(f"--special {token}: a word of the text reads the same; write it as <|{token.strip('<|>')}|>")
