"""Text into a folder of token shards.

    python -m training prepare --input tinyshakespeare --out data/shakespeare --tokenizer bytes
    python -m training prepare --input names.txt --documents line --test-fraction 0.1 --out data/names --tokenizer char
    python -m training prepare --input corpus/ more.jsonl.zst --text-key text --out data/corpus --workers 16

Documents stay apart: `<|endoftext|>` stands between any two of a split. Text is read as a stream and encoded in
bounded batches, so that its size does not matter. The folder appears whole or not at all. Free of torch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.atomic_folder import replace_folder
from model.controls import Label, read_controls
from model.tokenizer import Tokenizer
from model.tokenizer.extension import extend_tokenizer
from training.data.compressed import Meter
from training.data.encode import Encoded, encode_batches, make_batches
from training.data.hub_dataset import HubDataset
from training.data.labels import declare
from training.data.named_tokenizer import named_tokenizer
from training.data.prepare_request import PrepareRequest
from training.data.readers import Cut, Piece, ReadOptions, read_file
from training.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_TOKENS,
    TOKENIZER_DIR,
    DataManifest,
    Extended,
    SourceInfo,
    SplitInfo,
    SplitWriter,
    dtype_name,
    read_manifest,
    write_manifest,
)
from training.data.sources import Input, Source, check_inputs, fetch
from training.data.splits import Survey, split_documents, split_tail, tail_cuts
from training.errors import DataError

__all__ = ["Corpus", "OnProgress", "PrepareRequest", "prepare"]

# (what is being done, bytes read so far, bytes in all or None where that is not known)
OnProgress = Callable[[str, int, int | None], None]

# Where text may be cut for each kind of tokenizer, its tokens staying the same.
# Below this, starting processes takes longer than the tokenising.
_WORTH_WORKERS_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class Corpus:
    """All that is read, in order. It can be read several times."""

    sources: Sequence[Source | HubDataset]

    @property
    def num_bytes(self) -> int | None:
        """Of the files as they lie on the disk; None with a dataset, whose size is known only when it was read."""
        known = not any(isinstance(source, HubDataset) for source in self.sources)
        return sum(source.num_bytes for source in self.sources) if known else None

    def read(self, options: ReadOptions, meter: Meter) -> Iterator[Piece]:
        for source in self.sources:
            if isinstance(source, HubDataset):
                yield from source.read(options, meter)
            else:
                yield from read_file(source.path, source.origin, options, meter)


def prepare(
    request: PrepareRequest,
    *,
    on_progress: OnProgress = lambda what, done, total: None,
    on_notice: Callable[[str], None] = lambda line: None,
    shard_tokens: int = SHARD_TOKENS,
) -> tuple[DataManifest, bool]:
    """Writes `request.out`. Returns its manifest and whether anything had to be written.

    A folder that already holds these very sources with this tokenizer and split is left as it is; one that holds
    anything else is replaced only with `force`. `on_notice` gets what the user may want to know.
    Raises RecipeError, DataError or TokenizerError; the folder is then untouched.
    """
    inputs = check_inputs(request.inputs, request.digests, on_notice)
    rule = _split_rule(request, inputs)
    tokenizer = None if request.tokenizer == "char" else named_tokenizer(request.tokenizer, "--tokenizer")
    if (request.out / MANIFEST).is_file() and not request.force:
        return _existing(request, tokenizer, inputs, rule), False
    with tempfile.TemporaryDirectory(prefix="quill-prepare-") as downloads:
        # What is read twice is worth a copy on the disk.
        streaming = rule == "documents" and tokenizer is not None and not request.control_keys
        corpus = Corpus([_open(item, Path(downloads), streaming) for item in inputs])
        job = _Job(request, tokenizer, rule, corpus, on_progress, on_notice, shard_tokens)
        replace_folder(request.out, job.write, marker=MANIFEST)
    return read_manifest(request.out), True


@dataclass(frozen=True, slots=True)
class _Job:
    """One preparation, from opened sources to the folder. No `tokenizer` means one of the text's characters."""

    request: PrepareRequest
    tokenizer: Tokenizer | None
    rule: str
    corpus: Corpus
    on_progress: OnProgress
    on_notice: Callable[[str], None]
    shard_tokens: int

    def write(self, folder: Path) -> None:
        request, survey = self.request, Survey()
        if self.rule == "tail" or self.tokenizer is None or request.control_keys:
            survey = self._survey()
        base = self.tokenizer or Tokenizer.characters(survey.alphabet)
        tokenizer = self._extend(base, survey.labels) if request.extends else base
        (folder / TOKENIZER_DIR).mkdir()
        tokenizer.save(folder / TOKENIZER_DIR)
        meter = Meter()
        pieces = self.corpus.read(self._options(tokenizer.cut), meter)
        if self.rule == "tail":
            assigned = split_tail(pieces, tail_cuts(survey, request.shares), request.shares.names)
        else:
            assigned = split_documents(pieces, request.shares)
        batches = make_batches(assigned, lambda: meter.done)
        encoded = encode_batches(batches, tokenizer, folder / TOKENIZER_DIR, self._workers())
        splits = self._write_splits(folder, encoded, dtype_name(tokenizer.vocab_size))
        if tokenizer.eos_token_id is None and any(info.documents > 1 for info in splits.values()):
            self.on_notice(f"{request.tokenizer}: has no end-of-text token, so nothing stands between documents")
        write_manifest(folder, self._manifest(folder, tokenizer, splits))

    def _extend(self, base: Tokenizer, found: set[Label]) -> Tokenizer:
        request, tokenizer = self.request, base
        if request.special_tokens or request.text_tokens:
            tokenizer = extend_tokenizer(base, special=request.special_tokens, text=request.text_tokens)
        if request.control_keys:
            tokenizer = declare(tokenizer, request.known_controls, request.control_keys, found)
        if (added := tokenizer.vocab_size - base.vocab_size) > 0:
            self.on_notice(f"{request.tokenizer}: {added} tokens added, {tokenizer.vocab_size:,} in all")
        return tokenizer

    def _options(self, cut: Cut) -> ReadOptions:
        request = self.request
        return ReadOptions(request.documents, request.text_keys, cut, request.ordered_control_keys)

    def _survey(self) -> Survey:
        survey, meter = Survey(keep_alphabet=self.tokenizer is None), Meter()
        for number, piece in enumerate(self.corpus.read(self._options("anywhere"), meter)):
            survey.add(piece)
            if number % 64 == 0:
                self.on_progress("reading", meter.done, self.corpus.num_bytes)
        if not survey.characters:
            raise DataError("the inputs hold no text at all; check --text-key and --documents")
        return survey

    def _workers(self) -> int:
        if self.request.workers:
            return self.request.workers
        size = self.corpus.num_bytes
        return 1 if size is not None and size < _WORTH_WORKERS_BYTES else _usable_cores()

    def _write_splits(self, folder: Path, encoded: Iterator[Encoded], dtype: str) -> dict[str, SplitInfo]:
        total = self.corpus.num_bytes
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(SplitWriter(folder, name, dtype, self.shard_tokens))
                for name in self.request.shares.names
            }
            for item in encoded:
                batch = item.batch
                writers[batch.split].append(
                    item.tokens, num_bytes=item.num_bytes, characters=batch.characters, documents=batch.documents
                )
                self.on_progress("tokenising", batch.done, total)
            splits = {name: writer.finish() for name, writer in writers.items()}
        for name, info in splits.items():
            if info.tokens == 0:
                found = sum(each.documents for each in splits.values())
                raise DataError(
                    f"the {name} split would be empty: the text has only {found} documents and "
                    f"{sum(each.characters for each in splits.values())} characters; give more text or try --split tail"
                )
        return splits

    def _manifest(self, folder: Path, tokenizer: Tokenizer, splits: dict[str, SplitInfo]) -> DataManifest:
        request = self.request
        return DataManifest(
            version=FORMAT_VERSION,
            dtype=dtype_name(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.kind,
            tokenizer_digest=tokenizer.digest,
            val_fraction=request.val_fraction,
            sources=tuple(SourceInfo(each.origin, each.num_bytes, each.sha256) for each in self.corpus.sources),
            splits=splits,
            test_fraction=request.test_fraction,
            split=self.rule,
            documents=request.documents,
            text_keys=request.text_keys,
            control_keys=request.control_keys,
            controls=dict(read_controls(folder / TOKENIZER_DIR).values),
            extended=_extended(request, self.tokenizer),
        )


def _extended(request: PrepareRequest, tokenizer: Tokenizer | None) -> Extended | None:
    """`tokenizer` is the one that was named."""
    if not request.extends:
        return None
    return Extended("" if tokenizer is None else tokenizer.digest, request.special_tokens, request.text_tokens)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open(item: Input, downloads: Path, streaming: bool) -> Source | HubDataset:
    if item.kind == "dataset":
        return HubDataset(item.origin, item.location, item.sha256, streaming)
    return fetch(item, downloads)


def _split_rule(request: PrepareRequest, inputs: Sequence[Input]) -> str:
    if request.split != "auto":
        return request.split
    return "tail" if request.documents == "file" and all(item.is_plain_text for item in inputs) else "documents"


def _existing(request: PrepareRequest, tokenizer: Tokenizer | None, inputs: Sequence[Input], rule: str) -> DataManifest:
    """The manifest of `request.out`, if that is what preparing would write. Raises DataError if it is not."""
    manifest = read_manifest(request.out)
    if request.extends or manifest.extended is not None:  # the same rows have the same labels
        same_tokenizer = manifest.extended == _extended(request, tokenizer)
    elif tokenizer is None:  # the same text has the same characters
        same_tokenizer = manifest.tokenizer == "characters"
    else:
        same_tokenizer = manifest.tokenizer_digest == tokenizer.digest
    wanted = (
        request.val_fraction, request.test_fraction, rule, request.documents, request.text_keys, request.control_keys
    )  # fmt: skip
    found = (
        manifest.val_fraction, manifest.test_fraction, manifest.split, manifest.documents, manifest.text_keys,
        manifest.control_keys,
    )  # fmt: skip
    if same_tokenizer and wanted == found and _same_sources(inputs, manifest.sources):
        return manifest
    raise DataError(
        f"{request.out}: already holds other prepared data; choose another --out or pass --force to replace it"
    )


def _same_sources(inputs: Sequence[Input], sources: Sequence[SourceInfo]) -> bool:
    """By digest; a dataset of the hub, whose digest is not known beforehand, by name."""
    if len(inputs) != len(sources):
        return False
    pairs = zip(inputs, sources, strict=True)
    return all(item.sha256 == source.sha256 if item.sha256 else item.origin == source.origin for item, source in pairs)
