"""GrammarVocabulary: a tokenizer as llguidance sees it, which is what each token adds to a text. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from model.tokenizer import Tokenizer
from model.tokenizer.pieces import TokenPieces

if TYPE_CHECKING:
    import llguidance

_END = b"<end of the text>"


class GrammarVocabulary(msgspec.Struct, frozen=True, array_like=True):
    """`tokens[i]` are the bytes of token i, and `special` the ids that no text holds. `not_first` are the ids that add
    other bytes at the start of a text, where a grammar must not choose them.

    As msgpack it reaches the process that tries grammars, which has no tokenizer of its own.
    """

    tokens: list[bytes]
    special: list[int]
    not_first: list[int] = []

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int | None = None) -> GrammarVocabulary | None:
        """Of the tokens below `size` (default: all). None for a tokenizer whose tokens have no bytes of their own, or
        where hardly any adds at a text's start what it adds later (WordPiece's)."""
        pieces = tokenizer.pieces
        if pieces is None:
            return None
        size = tokenizer.vocab_size if size is None else min(size, tokenizer.vocab_size)
        tokens = [_token_bytes(pieces, token_id) for token_id in range(size)]
        # What has no bytes would be allowed everywhere, and for ever.
        special = [i for i in range(size) if not tokens[i] or i in pieces.special]
        for token_id in special:
            tokens[token_id] = b"<special %d>" % token_id
        not_first = _not_first(pieces, size)
        begins = set(range(size)) - set(special) - set(not_first)
        return cls(tokens, special, not_first) if any(tokens[i].isalnum() for i in begins) else None

    @property
    def size(self) -> int:
        return len(self.tokens)

    def ll_tokenizer(self) -> llguidance.LLTokenizer:
        """With one id more than the vocabulary, its last, which stands for the end of the text: llguidance asks for
        one, and which ids end a sequence is the model's business."""
        import llguidance

        source = _TokenSource([*self.tokens, _END], [*self.special, self.size])
        tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(source))
        source.tokenizer = tokenizer
        return tokenizer


class _TokenSource:
    """What llguidance's TokenizerWrapper reads. Called, it gives the ids of a text: the longest token at each place,
    by which llguidance chooses among the ways to write what a grammar leaves no choice about."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = None
        self.tokenizer: llguidance.LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        if self.tokenizer is None or not isinstance(text, str):
            raise TypeError("the wrapper tries bytes once, while it is made, and then gives strings")
        return self.tokenizer.greedy_tokenize(text)


def _token_bytes(pieces: TokenPieces, token_id: int) -> bytes:
    """A token that owes a space is written with it: the next token's text begins behind that space."""
    piece = pieces.later.get(token_id, b"")
    return piece + b" " if token_id in pieces.owing_space else piece


def _not_first(pieces: TokenPieces, size: int) -> list[int]:
    first, later = pieces.first, pieces.later
    changed = set() if first is None else {i for i in range(size) if first.get(i) != later.get(i)}
    if pieces.strip_count:
        changed |= {i for i in range(size) if later.get(i, b"").startswith(pieces.strip)}
    return sorted(changed)
