"""Examples: token sequences that stay whole, of whose tokens only some count as targets (an answer, not its prompt).

    DATA_DIR/{split}-00000.bin      the tokens of all examples, one behind the other, as of any prepared text
    DATA_DIR/{split}-counted.bin    a byte for each token: 1 where predicting it counts
    DATA_DIR/{split}-ends.bin       int64, where each example ends

Free of torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.data.shards import ExamplesInfo, FileInfo, SplitInfo, SplitWriter
from training.data.token_split import TokenSplit
from training.errors import DataError

IGNORED = -100
"""The target of a position whose prediction does not count, as torch's and transformers' cross-entropy have it."""

Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class ExampleSplit(TokenSplit):
    """A run of tokens that falls into examples. `answer_bytes` are the UTF-8 bytes that the counted tokens stand for.

    Example i is tokens [starts[i], ends[i]); `targets_before[t]` counts the counted tokens among the first t.
    """

    def __init__(self, tokens: TokenSplit, counted: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64],
                 answer_bytes: int) -> None:  # fmt: skip
        super().__init__(tokens.name, tokens.shards, lambda: tokens.num_bytes)
        self.counted, self.ends, self.answer_bytes = counted, ends, answer_bytes
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.targets_before = np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])

    @property
    def num_targets(self) -> int:
        return int(self.targets_before[-1])

    def __len__(self) -> int:
        return len(self.ends)


class ExampleRows:
    """Rows of at most `seq_len` positions, each of one example, or with `packing` of as many as fit in.

    An example takes a position for each token that is read, the last included, so that the next one in the row finds
    the end-of-text token before it. One that is longer than a row loses its end; one that then has no target left is
    left out. Packed examples come in an order that `seed` decides; nothing keeps them from seeing those before them in
    their row. `truncated` and `left_out` count examples.
    """

    def __init__(self, split: ExampleSplit, seq_len: int, *, packing: bool, seed: int = 0) -> None:
        self._split, self.seq_len, self._packing = split, seq_len, packing
        lengths = split.ends - split.starts
        self._lengths = np.minimum(lengths, seq_len)
        last = np.minimum(split.ends, split.starts + seq_len + 1)
        self._targets = split.targets_before[last] - split.targets_before[split.starts + 1]
        usable = np.flatnonzero(self._targets)
        if not len(usable):
            raise DataError(f"no answer of the {split.name} split lies within train.seq_len, {seq_len}; raise it")
        self.truncated = int(np.count_nonzero(lengths[usable] > seq_len + 1))
        self.left_out = len(split) - len(usable)
        self._rows = _packed(usable, self._lengths, seq_len, seed) if packing else usable.reshape(-1, 1)
        self.lengths = np.array([self._lengths[row].sum() for row in self._rows], dtype=np.int64)
        """Positions of each row that hold a token."""
        self.targets = np.array([self._targets[row].sum() for row in self._rows], dtype=np.int64)
        """Targets of each row that count; at least one."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_examples(self) -> int:
        return len(self._split) - self.left_out

    def stack(self, rows: Sequence[int], *, multiple: int = 64) -> Arrays:
        """Inputs and targets [len(rows), width] of these rows, IGNORED where no loss counts.

        `width` is `seq_len` of packed rows, otherwise the longest row's, rounded up to a `multiple` at most.
        """
        longest = int(self.lengths[list(rows)].max())
        width = self.seq_len if self._packing else min(self.seq_len, -(-longest // multiple) * multiple)
        inputs = np.zeros((len(rows), width), dtype=np.int64)  # what fills a row up is behind all that counts
        targets = np.full_like(inputs, IGNORED)
        for line, row in enumerate(rows):
            position = 0
            for example in self._rows[row]:
                length = int(self._lengths[example])
                place = slice(position, position + length)
                inputs[line, place], targets[line, place] = self._read(int(example), length)
                position += length
        return inputs, targets

    def _read(self, example: int, length: int) -> Arrays:
        """The first `length` tokens of an example and what follows each."""
        start, end = int(self._split.starts[example]), int(self._split.ends[example])
        inputs = self._split.read(start, length)
        targets = np.full(length, IGNORED, dtype=np.int64)
        following = min(length, end - start - 1)
        tokens = self._split.read(start + 1, following)
        targets[:following] = np.where(self._split.counted[start + 1 : start + 1 + following], tokens, IGNORED)
        return inputs, targets


def _packed(
    examples: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], seq_len: int, seed: int
) -> list[npt.NDArray[np.int64]]:
    """The examples in a shuffled order, each in the row of the one before it if it fits in there."""
    rows: list[list[int]] = []
    room = 0
    for example in examples[shuffled(len(examples), seed)].tolist():
        length = int(lengths[example])
        if length > room:
            rows.append([])
            room = seq_len
        rows[-1].append(example)
        room -= length
    return [np.array(row, dtype=np.int64) for row in rows]


def shuffled(count: int, *seeds: int) -> npt.NDArray[np.int64]:
    """0 … count − 1 in an order that the seeds decide."""
    # Sorted by a bit generator's raw output: numpy promises never to change that, unlike its permutations.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count), kind="stable")


class ExampleWriter:
    """Writes one split's files. `finish` completes them; leaving the block without it only closes the token shard."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self._folder, self._split = folder, split
        self._tokens = SplitWriter(folder, split, dtype)
        self._counted: list[npt.NDArray[np.uint8]] = []
        self._ends: list[int] = []
        self._length = self._answer_bytes = 0

    def append(self, ids: Sequence[int], counted: Iterable[bool], *, text: str, answer_bytes: int) -> None:
        """One example: its tokens, which of them count, its text without special tokens, its answers' size."""
        tokens = np.array(ids, dtype=np.int64)
        self._tokens.append(tokens, num_bytes=len(text.encode()), characters=len(text), documents=1)
        self._counted.append(np.fromiter(counted, dtype=np.uint8, count=len(ids)))
        self._length += len(ids)
        self._ends.append(self._length)
        self._answer_bytes += answer_bytes

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *problem: object) -> None:
        self._tokens.__exit__(*problem)

    def finish(self) -> SplitInfo:
        """Raises DataError for a split without examples."""
        if not self._ends:
            raise DataError(f"the {self._split} split would be empty; give more examples or a larger share")
        counted = self._write("counted", np.concatenate(self._counted))
        ends = self._write("ends", np.array(self._ends, dtype="<i8"))
        return self._tokens.finish(ExamplesInfo(counted, ends, self._answer_bytes))

    def _write(self, name: str, values: npt.NDArray[Any]) -> FileInfo:
        path, data = self._folder / f"{self._split}-{name}.bin", values.tobytes()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return FileInfo(path.name, hashlib.sha256(data).hexdigest())


def open_examples(folder: Path, tokens: TokenSplit, info: ExamplesInfo) -> ExampleSplit:
    """Raises DataError, naming the file, for one that is absent, altered or does not fit the tokens."""
    counted = np.frombuffer(_read(folder, info.counted), dtype=np.uint8)
    data = _read(folder, info.ends)
    ends = np.frombuffer(data, dtype="<i8") if len(data) % 8 == 0 else np.empty(0, dtype="<i8")
    if len(counted) != tokens.num_tokens or not len(ends) or counted.max() > 1:
        raise DataError(f"{folder}: the {tokens.name} examples do not fit their tokens; prepare the data again")
    if ends[-1] != tokens.num_tokens or ends[0] < 1 or np.any(np.diff(ends) < 1):
        raise DataError(f"{folder / info.ends.file}: not the ends of examples; prepare the data again")
    return ExampleSplit(tokens, counted, ends.astype(np.int64), info.answer_bytes)


def _read(folder: Path, file: FileInfo) -> bytes:
    path = folder / file.file
    if Path(file.file).name != file.file:
        raise DataError(f"{folder}: the manifest names {file.file!r}, which is not a file of this folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); prepare the data again") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(f"{path}: the content does not match the manifest's sha256; prepare the data again")
    return data
