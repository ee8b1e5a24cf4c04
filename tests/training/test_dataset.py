"""Folders of tokens: prepared, nanoGPT's and llm.c's, whole and damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.errors import QuillError
from model.tokenizer import Tokenizer
from tests.training.conftest import make_text
from training.config import DataConfig
from training.data.dataset import make_loader, open_dataset, open_folder, open_split
from training.data.prepare import PrepareRequest, prepare
from training.data.shards import data_digest, read_manifest
from training.errors import DataError, RecipeError

TEXT = make_text(900, seed=4)


def write_llmc(
    path: Path, ids: list[int], *, magic: int = 20240520, version: int = 1, count: int | None = None
) -> None:
    """A file as llm.c's data_common.py lays it out."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    tokens: npt.NDArray[Any] = np.array(ids, dtype="<u2" if version == 1 else "<u4")
    path.write_bytes(header.tobytes() + tokens.tobytes())


def write_nanogpt(folder: Path, train: list[int], val: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, ids in (("train", train), ("val", val)):
        np.array(ids, dtype="<u2").tofile(folder / f"{name}.bin")
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(dir=str(folder), **changes)


@pytest.fixture
def llmc(tmp_path: Path) -> Path:
    """Two training shards and a validation shard of GPT-2's tokens, beside a file that is none of them."""
    ids = Tokenizer.gpt2().encode(TEXT)
    write_llmc(tmp_path / "corpus_train_000002.bin", ids[500:1_000])
    write_llmc(tmp_path / "corpus_train_000001.bin", ids[:500])
    write_llmc(tmp_path / "corpus_val_000000.bin", [50_256, *ids[1_000:], 50_256])
    (tmp_path / "gpt2_124M.bin").write_bytes(b"weights of something")
    return tmp_path


def test_a_prepared_folder(data_dir: Path) -> None:
    dataset, manifest = open_dataset(config(data_dir)), read_manifest(data_dir)
    assert dataset.digest == data_digest(manifest)
    assert dataset.tokenizer.digest == Tokenizer.bytes().digest
    assert (dataset.train.num_tokens, dataset.val.num_tokens) == tuple(s.tokens for s in manifest.splits.values())
    assert dataset.val.num_bytes == manifest.splits["val"].bytes
    assert open_split(data_dir, "val").num_tokens == dataset.val.num_tokens


def test_llmc_shards_are_read_in_the_order_of_their_names(llmc: Path) -> None:
    dataset, ids = open_dataset(config(llmc)), Tokenizer.gpt2().encode(TEXT)
    assert dataset.train.read(0, dataset.train.num_tokens).tolist() == ids[:1_000]
    assert dataset.val.read(1, dataset.val.num_tokens - 2).tolist() == ids[1_000:]
    tail = dataset.tokenizer.decode(ids[1_000:])
    assert dataset.val.num_bytes == len(tail.encode())  # separators stand for no text
    assert dataset.val.num_bytes == sum(len(dataset.tokenizer.token_bytes(i)) for i in ids[1_000:])


def test_llama_shards_of_llmc_have_four_bytes(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_llmc(tmp_path / f"a_{name}_0.bin", [1, 2, 3, 250], magic=20240801, version=7)
    assert open_dataset(config(tmp_path, tokenizer="bytes")).train.read(0, 4).tolist() == [1, 2, 3, 250]


def test_a_nanogpt_folder_is_the_same_data_as_a_prepared_one(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nano"
    folder.mkdir()
    for name in ("train", "val"):
        shutil.copy(data_dir / f"{name}-00000.bin", folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")  # never opened
    raw, prepared = open_dataset(config(folder, tokenizer="bytes")), open_dataset(config(data_dir))
    assert raw.digest == prepared.digest
    assert raw.val.num_bytes == prepared.val.num_bytes
    assert np.array_equal(raw.train.read(5, 100), prepared.train.read(5, 100))
    tokenizer = prepared.tokenizer
    tokenizer.save(tmp_path)
    assert open_dataset(config(folder, tokenizer=str(tmp_path))).digest == raw.digest


def test_the_digest_tells_data_apart(tmp_path: Path) -> None:
    folders = [([1, 2, 3], [4, 5]), ([1, 2, 4], [4, 5]), ([1, 2], [3, 4, 5]), ([4, 5], [1, 2, 3])]
    digests = {
        open_folder(write_nanogpt(tmp_path / str(i), *splits), "bytes").digest for i, splits in enumerate(folders)
    }
    digests.add(open_folder(write_nanogpt(tmp_path / "0", *folders[0]), "gpt2").digest)
    assert len(digests) == len(folders) + 1
    unchecked = open_dataset(config(tmp_path / "0", tokenizer="bytes", verify=False))
    assert unchecked.digest in digests


def test_the_recipe_chooses_the_loader(data_dir: Path) -> None:
    strides = [
        make_loader(open_dataset(cfg), cfg, seq_len=16, seed=1).stride
        for cfg in (
            config(data_dir),
            config(data_dir, stride=4),
            config(data_dir, loader="sliding"),
            config(data_dir, loader="sliding", stride=4),
        )
    ]
    assert strides == [None, None, 8, 4]


def _odd(folder: Path) -> None:
    (folder / "train.bin").write_bytes(b"\0\0\0")


BAD: dict[str, tuple[Any, type[QuillError], str]] = {
    "beyond": (lambda f: write_nanogpt(f, [1, 257], [1, 2]), DataError, r"train\.bin: holds token id 257, beyond"),
    "odd": (_odd, DataError, r"train\.bin: has 3 bytes, which is no whole number"),
    "empty": (lambda f: (f / "val.bin").write_bytes(b""), DataError, r"val\.bin: has 0 bytes"),
    "short": (lambda f: write_llmc(f / "a_train_1.bin", [1, 2], count=3), DataError, r"promises 3 tokens.*1030 bytes"),
    "long": (lambda f: write_llmc(f / "a_train_1.bin", [1, 2], count=1), DataError, "promises 1 tokens"),
    "negative": (lambda f: write_llmc(f / "a_train_1.bin", [1, 2], count=-1), DataError, "promises -1 tokens"),
    "version": (lambda f: write_llmc(f / "a_train_1.bin", [1], version=2), DataError, r"a_train_1\.bin: version 2 of"),
    "magic": (lambda f: write_llmc(f / "a_train_1.bin", [1], magic=7), DataError, r"a_train_1\.bin: starts with 7 in"),
    "name": (
        lambda f: write_llmc(f / "train_val.bin", [1]),
        DataError,
        r"train_val\.bin: the name speaks of train and",
    ),
    "no-val": (lambda f: (f / "val.bin").unlink(), DataError, "holds no val split, only train"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_raw_folder_is_one_clear_error(case: str, tmp_path: Path) -> None:
    damage, error, message = BAD[case]
    write_nanogpt(tmp_path / "data", [1, 2, 3], [4, 5])
    damage(tmp_path / "data")
    with pytest.raises(error, match=message) as caught:
        open_dataset(config(tmp_path / "data", tokenizer="bytes"))
    assert "\n" not in str(caught.value)


def test_an_unknown_tokenizer_or_folder_is_named(tmp_path: Path) -> None:
    folder = write_nanogpt(tmp_path / "data", [1, 2, 3], [4, 5])
    with pytest.raises(RecipeError, match=r"data\.tokenizer nonesuch: neither"):
        open_dataset(config(folder, tokenizer="nonesuch"))
    for missing in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match="run `python -m training prepare"):
            open_dataset(config(missing))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:400], encoding="utf-8")
    prepare(PrepareRequest((str(tmp_path / "a.txt"),), tmp_path / "data", "bytes", 0.3))
    for name in ("train", "val"):
        shard = tmp_path / "data" / f"{name}-00000.bin"
        content = shard.read_bytes()
        for bit in range(0, 8 * len(content), 97):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            shard.write_bytes(flipped)
            with pytest.raises(DataError, match=f"{name}-00000.bin: the content does not match"):
                open_dataset(config(tmp_path / "data"))
            open_dataset(config(tmp_path / "data", verify=False))
        shard.write_bytes(content)
    open_dataset(config(tmp_path / "data"))


def _edit_manifest(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    shard = values["splits"]["train"]["shards"][0]
    for key, value in changes.items():
        (shard if key in shard else values["splits"]["train"] if key == "train_tokens" else values)[
            key.removeprefix("train_")
        ] = value
    (folder / "manifest.json").write_text(json.dumps(values))


PREPARED_BAD: dict[str, tuple[Any, str]] = {
    "truncated": (lambda f: _cut(f / "train-00000.bin"), r"train-00000\.bin: has \d+ bytes, not \d+"),
    "missing": (lambda f: (f / "val-00000.bin").unlink(), r"val-00000\.bin: the shard is missing"),
    "outside": (lambda f: _edit_manifest(f, file="../train-00000.bin"), "not a file of this folder"),
    "sum": (lambda f: _edit_manifest(f, train_tokens=7), "do not add up to the manifest's 7 tokens"),
    "version": (lambda f: _edit_manifest(f, version=9), "version or dtype is unknown"),
    "unreadable": (lambda f: (f / "manifest.json").write_text("{"), "not a readable manifest"),
    "vocabulary": (lambda f: _edit_manifest(f, vocab_size=100), "not the tokenizer that the data was prepared with"),
    "tokenizer": (lambda f: Tokenizer.characters("ab").save(f / "tokenizer"), "tokenizer: not the tokenizer that"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("case", PREPARED_BAD)
def test_a_damaged_prepared_folder_is_one_clear_error(case: str, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_dir, tmp_path / "copy"))
    damage, message = PREPARED_BAD[case]
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(config(folder))
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_found_though_the_digest_is_right(data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_dir, tmp_path / "copy"))
    shard = folder / "train-00000.bin"
    tokens = np.fromfile(shard, dtype="<u2")
    tokens[3] = 257
    tokens.tofile(shard)
    _edit_manifest(folder, sha256=hashlib.sha256(shard.read_bytes()).hexdigest())
    with pytest.raises(DataError, match=r"train-00000\.bin: holds token id 257, beyond the vocabulary of 257"):
        open_dataset(config(folder))


def test_a_test_split_is_opened_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    request = PrepareRequest((str(tmp_path / "a.txt"),), tmp_path / "data", "bytes", test_fraction=0.2)
    prepare(request)
    assert open_split(tmp_path / "data", "test").num_bytes == len(TEXT[int(len(TEXT) * 0.8) :].encode())
    with pytest.raises(DataError, match="holds no dev split, only train, val, test"):
        open_split(tmp_path / "data", "dev")
