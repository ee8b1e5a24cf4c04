"""Reads prepared tokens: memory-mapped shards, and batches that are a pure function of their number.

Sequences are numbered 0, 1, 2 … for the whole run. Within an epoch every window of the split is visited once,
in an order that a keyed permutation gives in constant memory; each epoch starts its windows at another phase,
so that they do not always break at the same places. Rank r of R takes the r-th share of every global batch,
hence the order of the data does not depend on the number of ranks, and a resumed run needs no loader state.
Free of torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.errors import DataError
from training.shards import DataManifest, ShardInfo, read_manifest

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 4


class TokenSplit:
    """One split as a single run of tokens over memory-mapped shards."""

    def __init__(self, folder: Path, name: str, manifest: DataManifest, *, verify: bool) -> None:
        info = manifest.splits.get(name)
        if info is None or info.tokens == 0:
            raise DataError(f"{folder}: holds no {name} split; known are {', '.join(manifest.splits)}")
        self.name, self.num_tokens, self.num_bytes = name, info.tokens, info.bytes
        self._shards = [_open_shard(folder, shard, manifest, verify) for shard in info.shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if int(self._ends[-1]) != info.tokens:
            raise DataError(f"{folder}: the {name} shards do not add up to the manifest's {info.tokens} tokens")

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length) as int64."""
        parts: list[npt.NDArray[Any]] = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        offset = start - (int(self._ends[index - 1]) if index else 0)
        while length > 0:
            part = self._shards[index][offset : offset + length]
            parts.append(part)
            length -= len(part)
            index, offset = index + 1, 0
        return np.concatenate(parts).astype(np.int64)


def open_split(folder: Path, name: str, *, verify: bool = True) -> TokenSplit:
    """Raises DataError for an absent, truncated or altered shard and for ids beyond the vocabulary."""
    return TokenSplit(folder, name, read_manifest(folder), verify=verify)


@dataclass(frozen=True, slots=True)
class TokenLoader:
    """Batches of one split. `rank` of `world_size` equal shares; `seed` decides the order.

    Raises DataError when the split is shorter than one sequence and its target.
    """

    split: TokenSplit
    seq_len: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.split.num_tokens < self.seq_len + 1:
            raise DataError(
                f"train.seq_len is {self.seq_len} but the {self.split.name} split has only "
                f"{self.split.num_tokens} tokens; it needs at least {self.seq_len + 1}"
            )

    @property
    def windows_per_epoch(self) -> int:
        return max(1, (self.split.num_tokens - self.seq_len) // self.seq_len)

    def batch(self, micro_step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets [B, T] of the micro-step counted from the start of the run."""
        first = (micro_step * self.world_size + self.rank) * self.batch_size
        rows = [self.split.read(self.window_start(first + i), self.seq_len + 1) for i in range(self.batch_size)]
        block = np.stack(rows)
        return block[:, :-1], block[:, 1:]

    def window_start(self, sequence: int) -> int:
        """First token of the run's sequence number `sequence`."""
        windows = self.windows_per_epoch
        epoch, index = divmod(sequence, windows)
        key = _mix(self.seed ^ _mix(epoch + 1))
        slack = self.split.num_tokens - 1 - windows * self.seq_len
        phase = key % (min(self.seq_len - 1, slack) + 1)
        return phase + permute(index, windows, key) * self.seq_len


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a pseudo-random permutation of range(size) chosen by the 64-bit `key`.

    A balanced Feistel network over the next even power of two is a bijection there; applying it again
    until the value falls below `size` ("cycle walking", Black and Rogaway 2002) restricts it to the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for step in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(key + step * 0x9E3779B97F4A7C15 ^ _mix(right)) & mask)
        value = left << half | right
        if value < size:
            return value


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit integers with good avalanche."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


def _open_shard(folder: Path, shard: ShardInfo, manifest: DataManifest, verify: bool) -> npt.NDArray[Any]:
    path = folder / shard.file
    if Path(shard.file).name != shard.file:
        raise DataError(f"{folder}: the manifest names {shard.file!r}, which is not a file of this folder")
    if not path.is_file():
        raise DataError(f"{path}: the shard is missing; prepare the data again")
    expected = shard.tokens * manifest.token_dtype.itemsize
    if path.stat().st_size != expected:
        raise DataError(f"{path}: has {path.stat().st_size} bytes, not {expected}; prepare the data again")
    tokens: npt.NDArray[Any] = np.memmap(path, dtype=manifest.token_dtype, mode="r")
    if verify:
        _verify_shard(path, shard, tokens, manifest.vocab_size)
    return tokens


def _verify_shard(path: Path, shard: ShardInfo, tokens: npt.NDArray[Any], vocab_size: int) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise DataError(f"{path}: the content does not match the manifest's sha256; prepare the data again")
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise DataError(f"{path}: holds token id {largest}, beyond the vocabulary of {vocab_size}")
