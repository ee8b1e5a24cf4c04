"""GrammarMatcher: where one sequence is in its grammar. Free of torch; numpy comes with a mask."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from server.engine.grammar_vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    import llguidance
    import numpy as np

WORD_BITS = 32


def mask_words(vocabulary_size: int) -> int:
    """int32 words of a mask: a bit for each token and one for llguidance's end of the text."""
    return -(-(vocabulary_size + 1) // WORD_BITS)


class GrammarMatcher:
    """Follows a sequence's generated tokens: its state is a function of these alone, and so outlives a preemption.

    `is_complete`: the text so far belongs to the language and nothing can follow it. `has_failed`: no more can be
    said, because the grammar became too complex or the vocabulary cannot write what it asks for; only this sequence
    is affected.
    """

    __slots__ = ("_matcher", "_num_tokens", "_vocabulary", "has_failed", "is_complete")

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._num_tokens = 0
        self.has_failed = False
        self.is_complete = False

    @property
    def is_too_complex(self) -> bool:
        """Whether it failed at a limit, rather than for want of a token that it allows."""
        return self.has_failed and self._matcher.is_error() and "NoExtension" not in self._matcher.get_error()

    def accept(self, token_id: int) -> None:
        """Take the next generated token, which is no EOS."""
        if not self._matcher.consume_token(token_id):
            self.has_failed = True
            return
        self._num_tokens += 1
        # Asked in this order: a matcher that has stopped short of the end of the text has failed.
        if self._matcher.is_stopped():
            self.is_complete = self._matcher.is_accepting()
            self.has_failed = not self.is_complete

    def fill(self, mask: np.ndarray, ends: Collection[int]) -> None:
        """Set the bits of the tokens that may come next in `mask` [mask_words] int32. `ends`, the model's EOS ids, are
        allowed where the text may end and nowhere else. Without any token it fails, and `mask` allows everything."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        bits = mask.view("uint8")
        _clear(bits, (self._vocabulary.size, *ends))
        if self._num_tokens == 0:
            _clear(bits, self._vocabulary.not_first)
        if not self._matcher.is_error() and self._matcher.is_accepting():
            _set(bits, ends)
        if self._matcher.is_error() or not mask.any():
            self.has_failed = True
            mask.fill(-1)


def _clear(bits: np.ndarray, ids: Iterable[int]) -> None:
    for token_id in ids:
        bits[token_id >> 3] &= 255 ^ (1 << (token_id & 7))


def _set(bits: np.ndarray, ids: Iterable[int]) -> None:
    for token_id in ids:
        bits[token_id >> 3] |= 1 << (token_id & 7)
