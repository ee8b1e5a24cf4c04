"""Text files as one run of tokens, in little memory however large they are. Free of torch.

The files are read and encoded piece by piece, as `prepare` does it, and their tokens put into a temporary file that
the windows are read from: two or four bytes a token of disk. Text is encoded in pieces where the tokenizer gives the
same tokens for them; one of another kind (`library`) needs a whole document in memory. Between documents stands the
end-of-text token, as in training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.tokenizer import Tokenizer
from training.data.compressed import Meter
from training.data.encode import encode_batches, make_batches
from training.data.readers import Piece, ReadOptions, read_file
from training.data.scratch import append_scratch
from training.errors import DataError
from training.evaluation.progress import OnProgress, silent


@dataclass(frozen=True, slots=True)
class TextTokens:
    """The ids of a text of `num_bytes` bytes in UTF-8, separators between documents not counted."""

    ids: npt.NDArray[Any]
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        return self.ids[start : start + length].astype(np.int64)


def encode_files(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    on_progress: OnProgress = silent,
    *,
    text_keys: Sequence[str] = ("text",),
) -> TextTokens:
    """Text, JSON lines, JSON or parquet (of a row the fields `text_keys`), each also with .gz or .zst.

    Raises DataError, naming the file, for one that is missing, empty, damaged or not UTF-8, TokenizerError for text
    that the tokenizer cannot express.
    """
    meter, num_bytes = Meter(), 0
    # Of plain files; what reading a folder fails with is told by the reader.
    total = sum(path.stat().st_size for path in paths if path.is_file())
    dtype: np.dtype[Any] = np.dtype(np.int64)
    options = ReadOptions(cut=tokenizer.cut, text_keys=tuple(text_keys))
    with tempfile.TemporaryFile(prefix="quill-evaluate-", buffering=0) as spool:
        batches = make_batches((("text", piece) for piece in _pieces(paths, options, meter)), lambda: meter.done)
        for encoded in encode_batches(batches, tokenizer, Path(), workers=1):
            dtype = encoded.tokens.dtype
            append_scratch(spool, encoded.tokens.tobytes(), "the text's tokens")
            num_bytes += encoded.num_bytes
            on_progress("tokenising", meter.done, total)
        # The mapping outlives the file's name and its handle.
        ids = np.memmap(spool, dtype=dtype, mode="r") if spool.tell() else np.array([], dtype=dtype)
    return TextTokens(ids, num_bytes)


def _pieces(paths: Sequence[Path], options: ReadOptions, meter: Meter) -> Iterator[Piece]:
    for path in paths:
        piece = None
        for piece in read_file(path, str(path), options, meter):
            yield piece
        if piece is None:
            raise DataError(f"{path}: the file is empty or holds no text; name another")
