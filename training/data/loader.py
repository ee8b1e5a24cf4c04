"""Sequences of tokens as a pure function of their number.

    loader = TokenLoader(dataset.train, seq_len=256, seed=1337)
    inputs, targets = loader.batch(first=0, count=16)

Sequences are numbered 0, 1, 2 … for the whole run, whatever the batch size and the number of ranks; who takes which
numbers is the trainer's business. Hence a resumed run needs no loader state and every number of ranks sees one order.
Within an epoch every window of the split is visited once, in an order that a keyed permutation gives in constant
memory. Packed windows lie side by side, and each epoch starts them at another phase, so that they do not always break
at the same places. Sliding windows start every `stride` tokens and overlap. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.token_split import TokenSplit
from training.errors import DataError

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 4


class BatchSize(NamedTuple):
    """Tokens that are read, and targets whose loss counts."""

    tokens: int
    targets: int


@dataclass(frozen=True, slots=True)
class TokenLoader:
    """Sequences of `seq_len` tokens and their targets; `seed` decides the order.

    `stride` None packs the windows, otherwise it is the distance in tokens between the starts of sliding windows.
    Raises DataError when the split is shorter than one sequence and its target.
    """

    split: TokenSplit
    seq_len: int
    seed: int
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.split.num_tokens < self.seq_len + 1:
            raise DataError(
                f"train.seq_len is {self.seq_len} but the {self.split.name} split has only "
                f"{self.split.num_tokens} tokens; it needs at least {self.seq_len + 1}"
            )
        assert self.stride is None or self.stride >= 1

    @property
    def windows_per_epoch(self) -> int:
        if self.stride is None:
            return max(1, (self.split.num_tokens - self.seq_len) // self.seq_len)
        return (self.split.num_tokens - 1 - self.seq_len) // self.stride + 1

    def batch(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets, [count, seq_len] each, of the run's sequences first … first + count - 1."""
        inputs = np.empty((count, self.seq_len), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row in range(count):
            tokens = self.split.read(self.window_start(first + row), self.seq_len + 1)
            inputs[row], targets[row] = tokens[:-1], tokens[1:]
        return inputs, targets

    def size(self, first: int, count: int) -> BatchSize:
        """Of the run's sequences first … first + count - 1: every token is read and every target counts."""
        return BatchSize(count * self.seq_len, count * self.seq_len)

    def window_start(self, sequence: int) -> int:
        """First token of the run's sequence number `sequence`."""
        windows = self.windows_per_epoch
        epoch, index = divmod(sequence, windows)
        key = _mix(self.seed ^ _mix(epoch + 1))
        index = permute(index, windows, key)
        if self.stride is not None:
            return index * self.stride
        slack = self.split.num_tokens - 1 - windows * self.seq_len
        phase = key % (min(self.seq_len - 1, slack) + 1)
        return phase + index * self.seq_len


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a pseudo-random permutation of range(size) chosen by the 64-bit `key`.

    A balanced Feistel network over the next even power of two is a bijection there; applying it again
    until the value falls below `size` ("cycle walking", Black and Rogaway 2002) restricts it to the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    round_keys = [key + step * _GOLDEN for step in range(_FEISTEL_ROUNDS)]
    value = index
    while True:
        left, right = value >> half, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(round_key ^ _mix(right)) & mask)
        value = left << half | right
        if value < size:
            return value


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit integers with good avalanche."""
    value = (value + _GOLDEN) & _MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
