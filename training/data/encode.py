"""Text into tokens, in this process or in several, in order and with a bounded amount of text in flight.

Free of torch.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.tokenizer import Tokenizer
from training.data.readers import Piece
from training.errors import DataError

_QUEUED_PER_WORKER = 4
# Enough text that starting a task costs little beside it, little enough that those in flight fit into memory.
_BATCH_CHARACTERS = 1 << 19
_BATCH_TEXTS = 1 << 14


@dataclass(slots=True)
class Batch:
    """Texts of one split. `breaks` says which begin a document that is not the split's first, `labels` the special
    tokens before each text; `done` is how much of the input had been read when the batch was full."""

    split: str
    texts: list[str] = field(default_factory=list)
    breaks: list[bool] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    characters: int = 0
    documents: int = 0
    done: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a batch, separators among them; `num_bytes` is the size of the text in UTF-8."""

    batch: Batch
    tokens: npt.NDArray[Any]
    num_bytes: int


def make_batches(pieces: Iterable[tuple[str, Piece]], read_so_far: Callable[[], int]) -> Iterator[Batch]:
    """Pieces of each split gathered, their order within the split kept."""
    batches: dict[str, Batch] = {}
    begun: set[str] = set()
    for split, (text, starts, labels) in pieces:
        batch = batches.setdefault(split, Batch(split))
        batch.texts.append(text)
        batch.breaks.append(starts and split in begun)
        batch.labels.append(tuple(label.token for label in labels) if starts else ())
        begun.add(split)
        batch.characters += len(text)
        batch.documents += starts
        if batch.characters >= _BATCH_CHARACTERS or len(batch.texts) >= _BATCH_TEXTS:
            batch.done = read_so_far()
            yield batches.pop(split)
    for batch in batches.values():
        batch.done = read_so_far()
        yield batch


def encode_batches(batches: Iterable[Batch], tokenizer: Tokenizer, folder: Path, workers: int) -> Iterator[Encoded]:
    """The batches with their tokens, in order. `folder` holds the tokenizer's files, for the `workers` to load.

    Raises TokenizerError for text that the tokenizer cannot express, DataError when a worker dies.
    """
    if workers == 1:
        for batch in batches:
            yield Encoded(batch, *encode_texts(tokenizer, batch.texts, batch.breaks, batch.labels))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (folder,))
    waiting: deque[tuple[Batch, Future[tuple[npt.NDArray[Any], int]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch.texts, batch.breaks, batch.labels)))
            if len(waiting) >= workers * _QUEUED_PER_WORKER:
                yield _finish(waiting)
        while waiting:
            yield _finish(waiting)
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was ended from outside, perhaps for memory; use fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_texts(
    tokenizer: Tokenizer, texts: list[str], breaks: list[bool], labels: list[tuple[str, ...]]
) -> tuple[npt.NDArray[Any], int]:
    """The ids of the texts one behind the other, with the end-of-text token at each break and each text's labels
    before it, and the texts' bytes."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    separator = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=dtype)
    parts: list[npt.NDArray[Any]] = []
    for ids, separated, tokens in zip(_ids(tokenizer, texts, dtype), breaks, labels, strict=True):
        if separated:
            parts.append(separator)
        if tokens:
            parts.append(np.array([tokenizer.special_tokens[token] for token in tokens], dtype=dtype))
        parts.append(ids)
    return np.concatenate(parts), sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


def _ids(tokenizer: Tokenizer, texts: list[str], dtype: type[np.unsignedinteger[Any]]) -> Iterator[npt.NDArray[Any]]:
    if tokenizer.kind == "bytes":  # ids are the bytes
        yield from (np.frombuffer(text.encode(), dtype=np.uint8).astype(dtype) for text in texts)
    elif tokenizer.kind == "library":  # which has threads of its own
        yield from (np.array(ids, dtype=dtype) for ids in tokenizer.encode_batch(texts, add_special=False))
    else:
        yield from (np.array(tokenizer.encode(text, add_special=False), dtype=dtype) for text in texts)


def _finish(waiting: deque[tuple[Batch, Future[tuple[npt.NDArray[Any], int]]]]) -> Encoded:
    batch, future = waiting.popleft()
    return Encoded(batch, *future.result())


_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = Tokenizer.load(folder)


def _encode_in_worker(
    texts: list[str], breaks: list[bool], labels: list[tuple[str, ...]]
) -> tuple[npt.NDArray[Any], int]:
    assert _worker_tokenizer is not None
    return encode_texts(_worker_tokenizer, texts, breaks, labels)
