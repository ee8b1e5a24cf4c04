"""Token files of nanoGPT and llm.c, read as they are.

- nanoGPT: `train.bin`, `val.bin` and perhaps `test.bin`, little-endian uint16 tokens and nothing else. The pickled
  `meta.pkl` beside them is never opened; the recipe's data.tokenizer says what the tokens mean.
- llm.c: any number of `.bin` files with "train", "val" or "test" as a word of their names, read in the order of their
  names. A header of 256 little-endian int32 (magic, version, number of tokens, zeros) precedes the tokens: 20240520 and
  1 for GPT-2's uint16, 20240801 and 7 for Llama 3's uint32 (llm.c, dev/data/data_common.py).

Free of torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.tokenizer import Tokenizer
from training.data.token_split import map_tokens
from training.errors import DataError

_HEADER_INTS = 256
_HEADER_BYTES = 4 * _HEADER_INTS
# magic: (version, type of the tokens)
_LLMC_FORMATS: dict[int, tuple[int, np.dtype[Any]]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_NANOGPT_FILES = ("train.bin", "val.bin", "test.bin")
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_COUNTED_AT_A_TIME = 1 << 22


@dataclass(frozen=True, slots=True)
class RawShard:
    """A file of tokens; `tokens` is memory-mapped."""

    path: Path
    tokens: npt.NDArray[Any]

    def sha256(self) -> str:
        """Digest of the tokens in hex, the header left out."""
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), _COUNTED_AT_A_TIME):
            digest.update(self.tokens[start : start + _COUNTED_AT_A_TIME].data)
        return digest.hexdigest()


def find_raw_splits(folder: Path) -> dict[str, list[Path]]:
    """The folder's `.bin` files by split, sorted by name; others are left out. Raises DataError for doubtful names."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.bin")):
        words = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in _SPLIT_WORDS}
        if len(words) > 1:
            raise DataError(f"{path}: the name speaks of {' and '.join(sorted(words))}; rename it after its split")
        for word in words:
            splits.setdefault(word, []).append(path)
    return splits


def open_raw_shard(path: Path) -> RawShard:
    """Raises DataError for a file that is neither format, or whose size is not what its header states."""
    magic, version, count = _read_header(path)
    if magic in _LLMC_FORMATS:
        expected, dtype = _LLMC_FORMATS[magic]
        if version != expected:
            raise DataError(f"{path}: version {version} of llm.c's format, of which only {expected} is known")
        return RawShard(path, _llmc_tokens(path, dtype, count))
    if path.name not in _NANOGPT_FILES:
        raise DataError(
            f"{path}: starts with {magic} in place of llm.c's magic number, and is not one of nanoGPT's files "
            f"({', '.join(_NANOGPT_FILES)}); write it again or move it away"
        )
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise DataError(f"{path}: has {size} bytes, which is no whole number of uint16 tokens; write it again")
    return RawShard(path, map_tokens(path, np.dtype("<u2")))


def count_text_bytes(shards: Sequence[npt.NDArray[Any]], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes that the tokens add to a text, special tokens counting none."""
    special = set(tokenizer.special_tokens.values())
    ids = range(tokenizer.vocab_size)
    lengths = np.array([0 if i in special else len(tokenizer.token_bytes(i)) for i in ids], dtype=np.int64)
    total = 0
    for tokens in shards:
        for start in range(0, len(tokens), _COUNTED_AT_A_TIME):
            total += int(lengths[tokens[start : start + _COUNTED_AT_A_TIME]].sum())
    return total


def _read_header(path: Path) -> tuple[int, int, int]:
    """The first three integers of the file, zeros where it ends earlier."""
    try:
        with path.open("rb") as file:
            data = file.read(12)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore the file") from None
    magic, version, count = np.frombuffer(data.ljust(12, b"\0"), dtype="<i4").tolist()
    return magic, version, count


def _llmc_tokens(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    size, expected = path.stat().st_size, _HEADER_BYTES + count * dtype.itemsize
    if count < 1 or size != expected:
        raise DataError(
            f"{path}: the header promises {count} tokens, which take {expected} bytes, but the file has {size}; "
            "write it again"
        )
    return map_tokens(path, dtype, offset=_HEADER_BYTES)
