"""One split of tokens as a single run over memory-mapped shards. Free of torch."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from training.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


class TokenSplit:
    """A run of tokens. `num_bytes` counts the UTF-8 bytes they stand for, special tokens excluded.

    `shards` are arrays of unsigned integers in the order of the run; `count_bytes` is called once, when `num_bytes`
    is first asked for.
    """

    def __init__(self, name: str, shards: Sequence[npt.NDArray[Any]], count_bytes: Callable[[], int]) -> None:
        # Plain arrays over the mappings: slicing np.memmap costs several times as much.
        self.shards = [shard.view(np.ndarray) for shard in shards]
        self._ends = list(accumulate(len(shard) for shard in shards))
        self._count_bytes = count_bytes
        self.name, self.num_tokens = name, self._ends[-1] if self._ends else 0

    @cached_property
    def num_bytes(self) -> int:
        return self._count_bytes()

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length) as int64; they must lie within the split."""
        out = np.empty(length, dtype=np.int64)
        index = bisect_right(self._ends, start)
        offset = start - (self._ends[index - 1] if index else 0)
        done = 0
        while done < length:
            part = self.shards[index][offset : offset + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            index, offset = index + 1, 0
        return out


def map_tokens(path: Path, dtype: np.dtype[Any], offset: int = 0) -> npt.NDArray[Any]:
    """The tokens of a file from byte `offset` on, memory-mapped. Raises DataError if it cannot be read."""
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset)
    except (OSError, ValueError) as error:  # ValueError: nothing behind the offset
        raise DataError(f"{path}: cannot be read as tokens ({error}); restore the file") from None


def check_ids(path: Path, tokens: npt.NDArray[Any], vocab_size: int) -> None:
    """Raises DataError, naming the file, if an id has no place in the vocabulary."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise DataError(f"{path}: holds token id {largest}, beyond the vocabulary of {vocab_size}")


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`function` of each item, in order. For hashing and scanning, which leave the interpreter's lock alone."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
