"""A folder of tokens, opened and checked: one that `prepare` wrote, or nanoGPT's or llm.c's files as they are.

Splits of prepared examples are `ExampleSplit`s.

    dataset = open_dataset(config.data)
    dataset.train.num_tokens, dataset.tokenizer.vocab_size, dataset.digest

Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from model.errors import TokenizerError
from model.manifest import file_sha256
from model.tokenizer import Tokenizer
from training.config import DataConfig
from training.data.examples import ExampleRows, ExampleSplit, open_examples
from training.data.examples_loader import ExampleLoader
from training.data.loader import TokenLoader
from training.data.named_tokenizer import named_tokenizer
from training.data.raw_shards import RawShard, count_text_bytes, find_raw_splits, open_raw_shard
from training.data.shards import (
    MANIFEST,
    TOKENIZER_DIR,
    DataManifest,
    ShardInfo,
    data_digest,
    read_manifest,
    tokens_digest,
)
from training.data.token_split import TokenSplit, check_ids, in_threads, map_tokens
from training.errors import DataError, RecipeError


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a run reads. `digest` is the identity of the tokens in hex, wherever they lie."""

    tokenizer: Tokenizer
    digest: str
    train: TokenSplit
    val: TokenSplit


class DataFolder(Protocol):
    """A folder of either kind; splits are opened when asked for."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def digest(self) -> str: ...
    @property
    def split_names(self) -> list[str]: ...
    def open_split(self, name: str, *, verify: bool) -> TokenSplit: ...


def open_dataset(config: DataConfig) -> Dataset:
    """Raises DataError, RecipeError or TokenizerError, naming the file, for data that cannot be used."""
    folder = open_folder(Path(config.dir), config.tokenizer)
    tokenizer = folder.tokenizer  # first: a folder with the wrong one is refused before its shards are read through
    train, val = (folder.open_split(name, verify=config.verify) for name in ("train", "val"))
    return Dataset(tokenizer, folder.digest, train, val)


def open_split(folder: Path, name: str, *, verify: bool = True, tokenizer: str = "gpt2") -> TokenSplit:
    """One split. Raises DataError for an absent, truncated or altered shard and for ids beyond the vocabulary.

    `tokenizer` is that of raw files; a prepared folder brings its own.
    """
    return open_folder(folder, tokenizer).open_split(name, verify=verify)


def open_folder(folder: Path, tokenizer: str = "gpt2") -> DataFolder:
    """Raises DataError when the folder holds neither a manifest nor raw token files."""
    if not (folder / MANIFEST).exists() and (splits := find_raw_splits(folder)):
        return RawFolder(folder, splits, named_tokenizer(tokenizer, "data.tokenizer"))
    return PreparedFolder(folder, read_manifest(folder))


def make_loader(dataset: Dataset, config: DataConfig, *, seq_len: int, seed: int) -> TokenLoader | ExampleLoader:
    """The training split's sequences, cut or put together as the recipe says. Raises RecipeError if they cannot be."""
    if isinstance(dataset.train, ExampleSplit):
        if config.loader == "sliding":
            raise RecipeError("data.loader is sliding but the data are examples; set data.loader=padded or packed")
        rows = ExampleRows(dataset.train, seq_len, packing=config.loader == "packed", seed=seed)
        return ExampleLoader(rows, seed)
    if config.loader == "padded":
        raise RecipeError("data.loader is padded but the data are no examples; set data.loader=packed")
    if config.loader == "packed":
        return TokenLoader(dataset.train, seq_len, seed)
    return TokenLoader(dataset.train, seq_len, seed, config.stride or max(1, seq_len // 2))


@dataclass(frozen=True)
class PreparedFolder:
    """Shards that must be what the manifest says."""

    folder: Path
    manifest: DataManifest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        try:
            tokenizer = Tokenizer.load(self.folder / TOKENIZER_DIR)
        except TokenizerError as error:
            raise DataError(f"{self.folder / TOKENIZER_DIR}: {error}") from None
        stated = (self.manifest.vocab_size, self.manifest.tokenizer_digest)
        if (tokenizer.vocab_size, tokenizer.digest) != stated:
            raise DataError(f"{self.folder / TOKENIZER_DIR}: not the tokenizer that the data was prepared with")
        return tokenizer

    @property
    def digest(self) -> str:
        return data_digest(self.manifest)

    @property
    def split_names(self) -> list[str]:
        return list(self.manifest.splits)

    def open_split(self, name: str, *, verify: bool) -> TokenSplit:
        info = self.manifest.splits.get(name)
        if info is None or info.tokens == 0:
            raise _no_split(self, self.folder, name)
        shards = [self._open_shard(shard) for shard in info.shards]
        if sum(len(shard) for shard in shards) != info.tokens:
            raise DataError(f"{self.folder}: the {name} shards do not add up to the manifest's {info.tokens} tokens")
        if verify:
            in_threads(self._verify_shard, list(zip(info.shards, shards, strict=True)))
        tokens = TokenSplit(name, shards, lambda: info.bytes)
        return tokens if info.examples is None else open_examples(self.folder, tokens, info.examples)

    def _open_shard(self, shard: ShardInfo) -> npt.NDArray[Any]:
        path = self.folder / shard.file
        if Path(shard.file).name != shard.file:
            raise DataError(f"{self.folder}: the manifest names {shard.file!r}, which is not a file of this folder")
        if not path.is_file():
            raise DataError(f"{path}: the shard is missing; prepare the data again")
        expected = shard.tokens * self.manifest.token_dtype.itemsize
        if path.stat().st_size != expected:
            raise DataError(f"{path}: has {path.stat().st_size} bytes, not {expected}; prepare the data again")
        return map_tokens(path, self.manifest.token_dtype)

    def _verify_shard(self, item: tuple[ShardInfo, npt.NDArray[Any]]) -> None:
        shard, tokens = item
        path = self.folder / shard.file
        if file_sha256(path) != shard.sha256:
            raise DataError(f"{path}: the content does not match the manifest's sha256; prepare the data again")
        check_ids(path, tokens, self.manifest.vocab_size)


@dataclass(frozen=True)
class RawFolder:
    """nanoGPT's or llm.c's files. There is no manifest, so the digest takes one reading of every token."""

    folder: Path
    paths: dict[str, list[Path]]
    tokenizer: Tokenizer
    _opened: dict[str, list[RawShard]] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        shards = {name: self._shards(name) for name in self.paths}
        types = {shard.tokens.dtype.name for each in shards.values() for shard in each}
        digests = {name: in_threads(_length_and_digest, each) for name, each in shards.items()}
        return tokens_digest("+".join(sorted(types)), self.tokenizer.vocab_size, self.tokenizer.digest, digests)

    @property
    def split_names(self) -> list[str]:
        return list(self.paths)

    def open_split(self, name: str, *, verify: bool) -> TokenSplit:
        if name not in self.paths:
            raise _no_split(self, self.folder, name)
        shards = self._shards(name)
        if verify:
            in_threads(lambda shard: check_ids(shard.path, shard.tokens, self.tokenizer.vocab_size), shards)
        tokens = [shard.tokens for shard in shards]
        return TokenSplit(name, tokens, lambda: count_text_bytes(tokens, self.tokenizer))

    def _shards(self, name: str) -> list[RawShard]:
        if name not in self._opened:
            self._opened[name] = [open_raw_shard(path) for path in self.paths[name]]
        return self._opened[name]


def _length_and_digest(shard: RawShard) -> tuple[int, str]:
    return len(shard.tokens), shard.sha256()


def _no_split(data: DataFolder, folder: Path, name: str) -> DataError:
    return DataError(f"{folder}: holds no {name} split, only {', '.join(data.split_names)}; prepare it with one")
