"""Text into a folder of token shards.

    python -m training prepare --input tinyshakespeare --out data/shakespeare --tokenizer bytes

Each input is one document; `<|endoftext|>` stands between documents. The last `val_fraction` of the characters of all
of them, in the order given, is the validation split. The folder appears whole or not at all. Free of torch.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.atomic_folder import replace_folder
from model.tokenizer import Tokenizer
from training.errors import DataError, RecipeError
from training.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_TOKENS,
    TOKENIZER_DIR,
    DataManifest,
    SourceInfo,
    SplitInfo,
    SplitWriter,
    dtype_name,
    read_manifest,
    write_manifest,
)
from training.sources import Input, Source, check_inputs, fetch, read_pieces, read_text

_QUEUED_PER_WORKER = 4
# Tokenizers known to give the same ids for text cut at `sources._SAFE_CUT`; others get whole documents.
_CUTTABLE = ("gpt2", "char", "bytes")


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What `prepare` is asked for. `digests` are the sha256 of the URLs among `inputs`, in their order."""

    inputs: tuple[str, ...]
    out: Path
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1
    digests: tuple[str, ...] = ()
    workers: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise RecipeError(f"--val-fraction is {self.val_fraction} but must lie between 0 and 1")
        if self.workers < 1:
            raise RecipeError(f"--workers is {self.workers} but must be at least 1")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is encoded on its own. `ends_document` asks for an end-of-text token behind it."""

    split: str
    text: str
    ends_document: bool


def prepare(
    request: PrepareRequest,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    shard_tokens: int = SHARD_TOKENS,
) -> tuple[DataManifest, bool]:
    """Writes `request.out`. Returns its manifest and whether anything had to be written.

    A folder that already holds these very sources with this tokenizer and split is left as it is; one that holds
    anything else is replaced only with `force`. `on_progress` gets encoded and total characters.
    Raises RecipeError, DataError or TokenizerError; the folder is then untouched.
    """
    inputs = check_inputs(request.inputs, request.digests)
    if (request.out / MANIFEST).is_file() and not request.force:
        return _existing(request, inputs), False
    with tempfile.TemporaryDirectory(prefix="quill-prepare-") as downloads:
        sources = [fetch(item, Path(downloads)) for item in inputs]
        tokenizer = make_tokenizer(request.tokenizer, sources)
        replace_folder(
            request.out,
            lambda folder: _write(folder, request, sources, tokenizer, on_progress, shard_tokens),
            marker=MANIFEST,
        )
    return read_manifest(request.out), True


def make_tokenizer(name: str, sources: Sequence[Source]) -> Tokenizer:
    """`gpt2`, `bytes`, `char` (the characters of the sources), or a tokenizer.json or a folder that holds one."""
    match name:
        case "gpt2":
            return Tokenizer.gpt2()
        case "bytes":
            return Tokenizer.bytes()
        case "char":
            characters: set[str] = set()
            for source in sources:
                for chunk in read_text(source):
                    characters.update(chunk)
            return Tokenizer.characters(characters)
    path = Path(name)
    if not path.exists():
        raise RecipeError(f"--tokenizer {name}: neither gpt2, char or bytes nor an existing path")
    return Tokenizer.load(path) if path.is_dir() else Tokenizer.from_file(path)


def _existing(request: PrepareRequest, inputs: Sequence[Input]) -> DataManifest:
    """The manifest of `request.out`, if that is what preparing would write. Raises DataError if it is not."""
    manifest = read_manifest(request.out)
    if request.tokenizer == "char":  # the same text has the same characters
        same_tokenizer = manifest.tokenizer == "characters"
    else:
        same_tokenizer = manifest.tokenizer_digest == make_tokenizer(request.tokenizer, ()).digest
    same_text = [item.sha256 for item in inputs] == [source.sha256 for source in manifest.sources]
    if same_tokenizer and same_text and manifest.val_fraction == request.val_fraction:
        return manifest
    raise DataError(
        f"{request.out}: already holds other prepared data; choose another --out or pass --force to replace it"
    )


def _write(
    folder: Path,
    request: PrepareRequest,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    on_progress: Callable[[int, int], None],
    shard_tokens: int,
) -> None:
    (folder / TOKENIZER_DIR).mkdir()
    tokenizer.save(folder / TOKENIZER_DIR)
    dtype = dtype_name(tokenizer.vocab_size)
    total = sum(len(chunk) for source in sources for chunk in read_text(source))
    pieces = split_pieces(
        sources, int(total * (1.0 - request.val_fraction)), cut=request.tokenizer in _CUTTABLE, last=len(sources) - 1
    )
    encoded = _encode_all(pieces, tokenizer, folder / TOKENIZER_DIR, request.workers)
    writers = {split: SplitWriter(folder, split, dtype, shard_tokens) for split in ("train", "val")}
    splits = _write_splits(writers, encoded, tokenizer.eos_token_id, lambda done: on_progress(done, total))
    for split, info in splits.items():
        if info.tokens == 0:
            raise DataError(f"the {split} split would be empty: the text has only {total} characters")
    manifest = DataManifest(
        version=FORMAT_VERSION,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.kind,
        tokenizer_digest=tokenizer.digest,
        val_fraction=request.val_fraction,
        sources=tuple(SourceInfo(source.origin, source.num_bytes, source.sha256) for source in sources),
        splits=splits,
    )
    write_manifest(folder, manifest)


def _write_splits(
    writers: dict[str, SplitWriter],
    encoded: Iterator[tuple[Piece, npt.NDArray[np.int64]]],
    separator: int | None,
    on_progress: Callable[[int], None],
) -> dict[str, SplitInfo]:
    done = 0
    for piece, tokens in encoded:
        writers[piece.split].append(tokens, piece.text)
        if piece.ends_document and separator is not None:
            writers[piece.split].append(np.array([separator]))
        done += len(piece.text)
        on_progress(done)
    return {split: writer.close() for split, writer in writers.items()}


def split_pieces(sources: Sequence[Source], train_characters: int, *, cut: bool, last: int) -> Iterator[Piece]:
    """The documents as pieces; the first `train_characters` characters of them all are the training split."""
    position = 0
    for number, source in enumerate(sources):
        texts = _with_end(read_pieces(source, cut=cut))
        for text, is_end in texts:
            room = max(0, train_characters - position)
            position += len(text)
            ends = is_end and number != last
            if room:
                yield Piece("train", text[:room], ends and len(text) <= room)
            if len(text) > room:
                yield Piece("val", text[room:], ends)


def _with_end(items: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each item with whether it is the last."""
    iterator = iter(items)
    for previous in iterator:
        for item in iterator:
            yield previous, False
            previous = item
        yield previous, True


def _encode_all(
    pieces: Iterator[Piece], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[Piece, npt.NDArray[np.int64]]]:
    """Pieces with their ids, in order. Several workers keep a bounded number of pieces in flight."""
    if workers == 1:
        for piece in pieces:
            yield piece, _encode(tokenizer, piece.text)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(folder,)) as pool:
        waiting: deque[tuple[Piece, Future[npt.NDArray[np.int64]]]] = deque()
        for piece in pieces:
            waiting.append((piece, pool.submit(_encode_in_worker, piece.text)))
            if len(waiting) >= workers * _QUEUED_PER_WORKER:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _encode(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int64]:
    return np.array(tokenizer.encode(text, add_special=False), dtype=np.int64)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.load(folder)


def _encode_in_worker(text: str) -> npt.NDArray[np.int64]:
    assert _worker_tokenizer is not None
    return _encode(_worker_tokenizer, text)
