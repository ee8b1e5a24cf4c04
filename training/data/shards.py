"""The prepared data folder: flat little-endian token shards and a `manifest.json` that describes them.

    DATA_DIR/manifest.json                 counts, digests, splits
    DATA_DIR/tokenizer/                    the tokenizer's own files
    DATA_DIR/{train,val,test}-00000.bin    uint16 tokens, or uint32 when the vocabulary exceeds 65,536

Free of torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import numpy as np
import numpy.typing as npt

from training.errors import DataError

MANIFEST = "manifest.json"
TOKENIZER_DIR = "tokenizer"
FORMAT_VERSION = 1
SHARD_TOKENS = 100_000_000
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class ShardInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    file: str
    tokens: int
    sha256: str


class FileInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    file: str
    sha256: str


class ExamplesInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a split's tokens fall into examples; see `training.data.examples`. `answer_bytes` is the size of the text
    that the counted tokens stand for."""

    counted: FileInfo
    ends: FileInfo
    answer_bytes: int


class SplitInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`bytes` and `characters` count the text, document separators excluded; a document cut in two counts in both."""

    tokens: int
    bytes: int
    characters: int
    shards: tuple[ShardInfo, ...]
    documents: int = 1
    examples: ExamplesInfo | None = None


class SourceInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    origin: str
    bytes: int
    sha256: str


class Extended(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What prepare added to a tokenizer: `base` is the digest of that one, "" of one made of the text's characters."""

    base: str
    special_tokens: tuple[str, ...]
    text_tokens: tuple[str, ...]


class DataManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a data folder holds. `tokenizer` is the tokenizer's kind, `tokenizer_digest` its identity.

    `split`, `documents` and `text_keys` say how text was divided into documents and these into splits, `control_keys`
    which fields of a row gave the labels before it; `controls` are the tokenizer's control tokens. Of `kind`
    "examples" every split has `examples`, and `template` names the chat template that they were written by, whose
    text has the sha256 `template_digest`.
    """

    version: int
    dtype: str
    vocab_size: int
    tokenizer: str
    tokenizer_digest: str
    val_fraction: float
    sources: tuple[SourceInfo, ...]
    splits: dict[str, SplitInfo]
    test_fraction: float = 0.0
    split: str = "tail"
    documents: str = "file"
    text_keys: tuple[str, ...] = ("text",)
    control_keys: tuple[str, ...] = ()
    controls: dict[str, tuple[str, ...]] = {}
    extended: Extended | None = None
    kind: Literal["text", "examples"] = "text"
    template: str = ""
    template_digest: str = ""

    @property
    def token_dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.dtype]


def dtype_name(vocab_size: int) -> str:
    """The narrowest shard type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(folder: Path) -> DataManifest:
    """Raises DataError when the folder was not prepared or its manifest is damaged."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=DataManifest)
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}; run `python -m training prepare --out {folder}` first") from None
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}); prepare the data again") from None
    if manifest.version != FORMAT_VERSION or manifest.dtype not in _DTYPES:
        raise DataError(f"{path}: version or dtype is unknown to this release; prepare the data again")
    return manifest


def write_manifest(folder: Path, manifest: DataManifest) -> None:
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    with (folder / MANIFEST).open("wb") as file:
        file.write(data + b"\n")
        file.flush()
        os.fsync(file.fileno())


def data_digest(manifest: DataManifest) -> str:
    """Identity of the tokens: the same text, tokenizer and split give the same, wherever the text came from."""
    shards = {name: [(shard.tokens, shard.sha256) for shard in info.shards] for name, info in manifest.splits.items()}
    for name, info in manifest.splits.items():
        if info.examples is not None:
            shards[name] += [(info.documents, file.sha256) for file in (info.examples.counted, info.examples.ends)]
    return tokens_digest(manifest.dtype, manifest.vocab_size, manifest.tokenizer_digest, shards)


def tokens_digest(
    dtype: str, vocab_size: int, tokenizer_digest: str, shards: Mapping[str, Sequence[tuple[int, str]]]
) -> str:
    """sha256 in hex over what decides the tokens; `shards` gives each split's token counts and digests in order."""
    facts = (dtype, vocab_size, tokenizer_digest, sorted(shards.items()))
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


class SplitWriter:
    """Appends tokens of one split, opening a new shard whenever the last is full.

    `finish` completes the last shard; leaving the block without it, after an error, only closes the file.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split = folder, split
        self._dtype, self._shard_tokens = _DTYPES[dtype], shard_tokens
        self._shards: list[ShardInfo] = []
        self._file: Any = None
        self._room = 0
        self._tokens = self._bytes = self._characters = self._documents = 0

    def append(self, tokens: npt.NDArray[Any], *, num_bytes: int, characters: int, documents: int) -> None:
        """The counts are of the text that the tokens stand for."""
        self._tokens += len(tokens)
        self._bytes += num_bytes
        self._characters += characters
        self._documents += documents
        while len(tokens):
            if self._room == 0:
                self._open()
            part, tokens = tokens[: self._room], tokens[self._room :]
            data = part.astype(self._dtype, copy=False).tobytes()
            self._file.write(data)
            self._hash.update(data)
            self._room -= len(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        if self._file is not None:
            self._file.close()

    def finish(self, examples: ExamplesInfo | None = None) -> SplitInfo:
        self._finish_shard()
        return SplitInfo(self._tokens, self._bytes, self._characters, tuple(self._shards), self._documents, examples)

    def _open(self) -> None:
        self._finish_shard()
        self._path = self._folder / f"{self._split}-{len(self._shards):05d}.bin"
        self._file = self._path.open("wb")
        self._hash = hashlib.sha256()
        self._room = self._shard_tokens

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards.append(ShardInfo(self._path.name, self._shard_tokens - self._room, self._hash.hexdigest()))
