"""WaitingRoom: how much may wait for its first step, and whose it is. The limits of honest overload; free of torch."""

from __future__ import annotations

from collections import Counter


class WaitingRoom:
    """Counts the sequences that have had no output yet, and their tokens, for each pool of clients.

    At most `max_sequences` wait beyond those that can run at once, and at most `max_tokens` tokens, prompts and answers
    together, wait for their first output (None: any number; a request that is larger than that alone is let in where
    nothing else waits). A pool that holds less than an equal share of a limit is let in even where others have used the
    limit up: k pools together may so hold up to 1 + 1/2 + … + 1/k times as much.
    """

    def __init__(self, max_sequences: int, max_tokens: int | None = None) -> None:
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._sequences: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()

    @property
    def num_sequences(self) -> int:
        return self._sequences.total()

    @property
    def num_tokens(self) -> int:
        return self._tokens.total()

    def enter(self, pool: int, num_tokens: int) -> None:
        self._sequences[pool] += 1
        self._tokens[pool] += num_tokens

    def leave(self, pool: int, num_tokens: int) -> None:
        """Of a sequence that entered: it has had its first output, or is gone."""
        self._sequences[pool] -= 1
        self._tokens[pool] -= num_tokens
        if not self._sequences[pool]:
            del self._sequences[pool], self._tokens[pool]

    def clear(self) -> None:
        self._sequences.clear()
        self._tokens.clear()

    def admits(self, pool: int, num_sequences: int, num_tokens: int, num_queued: int) -> bool:
        """Whether so many more may wait; with them, `num_queued` would be beyond those that can run at once."""
        num_pools = len(self._sequences.keys() | {pool})
        if num_queued > self._max_sequences and not _within_share(
            self._sequences[pool] + num_sequences, self._max_sequences, num_pools
        ):
            return False
        if self._max_tokens is None or not self._tokens or self.num_tokens + num_tokens <= self._max_tokens:
            return True
        return _within_share(self._tokens[pool] + num_tokens, self._max_tokens, num_pools)

    def num_ahead(self, pool: int, num_queued: int) -> int:
        """How many of `num_queued` sequences have their turn up to a newcomer's, itself included: pools take turns."""
        if self._sequences.keys() <= {pool}:
            return num_queued
        own = self._sequences[pool] + 1
        return min(num_queued, own + sum(min(count, own) for each, count in self._sequences.items() if each != pool))


def _within_share(amount: int, limit: int, num_pools: int) -> bool:
    return num_pools > 1 and amount <= max(1, limit // num_pools)
