"""Rows of examples as a pure function of their number in the run, as `training.data.loader` has it. Free of torch."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.examples import Arrays, ExampleRows, shuffled
from training.data.loader import BatchSize

Integers = npt.NDArray[np.int64]


class _Epoch(NamedTuple):
    """The rows in the order in which they are read, and the tokens and targets of those before each."""

    order: Integers
    tokens_before: Integers
    targets_before: Integers


class ExampleLoader:
    """The rows numbered 0, 1, 2 … for the whole run. Each is read once an epoch, in an order that `seed` decides."""

    def __init__(self, rows: ExampleRows, seed: int) -> None:
        self.rows = rows
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    def batch(self, first: int, count: int) -> Arrays:
        """Inputs and targets of the run's rows first … first + count − 1; see `ExampleRows.stack`."""
        return self.rows.stack([self.row(first + number) for number in range(count)])

    def size(self, first: int, count: int) -> BatchSize:
        """Tokens and counted targets of these rows."""
        start, end = self._before(first), self._before(first + count)
        return BatchSize(end.tokens - start.tokens, end.targets - start.targets)

    def row(self, sequence: int) -> int:
        """Which of the rows is the run's number `sequence`."""
        epoch, index = divmod(sequence, len(self.rows))
        return int(self._epoch(epoch).order[index])

    def _before(self, sequence: int) -> BatchSize:
        epoch, index = divmod(sequence, len(self.rows))
        now = self._epoch(epoch)
        return BatchSize(
            int(epoch * now.tokens_before[-1] + now.tokens_before[index]),
            int(epoch * now.targets_before[-1] + now.targets_before[index]),
        )

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = shuffled(len(self.rows), self._seed, epoch)
        before = (np.concatenate([[0], np.cumsum(each[order])]) for each in (self.rows.lengths, self.rows.targets))
        return _Epoch(order, *before)
