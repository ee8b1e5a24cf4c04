"""PromptLookup: guesses a sequence's next tokens from what it has said before. Free of torch.

After "prompt lookup decoding" (Saxena 2023): where the last few tokens occurred earlier in the same sequence, what
followed them then is the guess. A step computes the guess beside the next token; drawing at every position with that
position's own random number shows how far the guess was right, and what is drawn is what would have been drawn
without it. A wrong guess costs rows of a step, so that it is made only where rows are nearly free.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 5, 3
# Steps without a guess after one of which nothing was right: doubled each time up to the most, forgotten at a success.
_FIRST_PAUSE, _LONGEST_PAUSE = 2, 64


class PromptLookup:
    """One sequence's index of n-grams; `propose` and `settle` alternate."""

    __slots__ = ("_ends", "_indexed", "_pause", "_waiting")

    def __init__(self) -> None:
        # For each length, the place behind an n-gram's latest occurrence but the last one, which ends the sequence.
        self._ends: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in range(_SHORTEST, _LONGEST + 1))
        self._indexed = 0
        self._pause = _FIRST_PAUSE
        self._waiting = 0

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `token_ids`, which has only grown since the last call."""
        if self._waiting:
            self._waiting -= 1
            return []
        self._index(token_ids)
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            start = self._ends[length - _SHORTEST].get(tuple(token_ids[-length:]))
            if start is not None:
                return list(token_ids[start : start + most])
        return []

    def settle(self, num_right: int) -> None:
        """How many tokens of the last proposal, which was not empty, were right."""
        if num_right:
            self._pause = _FIRST_PAUSE
        else:
            self._waiting = self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _index(self, token_ids: Sequence[int]) -> None:
        """Enter the n-grams that end before the last token."""
        for end in range(max(self._indexed, _SHORTEST), len(token_ids)):
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[length - _SHORTEST][tuple(token_ids[end - length : end])] = end
        self._indexed = len(token_ids)
