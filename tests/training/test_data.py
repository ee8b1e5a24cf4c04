"""Order, coverage and integrity of the batches."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data import TokenLoader, open_split, permute
from training.errors import DataError
from training.prepare import PrepareRequest, prepare


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_depends_on_the_key_and_is_not_the_identity() -> None:
    orders = {tuple(permute(index, 50, key) for index in range(50)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(50)) not in orders


def test_batches_are_shifted_windows_of_the_split(data_dir: Path) -> None:
    split = open_split(data_dir, "train")
    loader = TokenLoader(split, seq_len=16, batch_size=3, seed=7)
    whole = split.read(0, split.num_tokens)
    inputs, targets = loader.batch(5)
    assert inputs.shape == targets.shape == (3, 16)
    for row in range(3):
        start = loader.window_start(5 * 3 + row)
        assert np.array_equal(inputs[row], whole[start : start + 16])
        assert np.array_equal(targets[row], whole[start + 1 : start + 17])


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(data_dir: Path) -> None:
    loader = TokenLoader(open_split(data_dir, "train"), seq_len=16, batch_size=1, seed=7)
    windows = loader.windows_per_epoch
    epochs = [[loader.window_start(e * windows + i) for i in range(windows)] for e in range(3)]
    for starts in epochs:
        phase = min(starts)
        assert sorted(starts) == [phase + 16 * i for i in range(windows)]
        assert max(starts) + 17 <= loader.split.num_tokens
    assert len({tuple(starts) for starts in epochs}) == 3
    assert len({min(starts) for starts in epochs}) > 1


def test_ranks_share_the_order_of_one_rank(data_dir: Path) -> None:
    split = open_split(data_dir, "train")
    alone = TokenLoader(split, seq_len=8, batch_size=4, seed=3)
    ranks = [TokenLoader(split, seq_len=8, batch_size=2, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for step in range(5):
        together = np.concatenate([loader.batch(step)[0] for loader in ranks])
        assert np.array_equal(together, alone.batch(step)[0])


def test_reads_cross_shards(text_file: Path, tmp_path: Path) -> None:
    prepare(PrepareRequest((str(text_file),), tmp_path / "a", "bytes"), shard_tokens=101)
    prepare(PrepareRequest((str(text_file),), tmp_path / "b", "bytes"))
    many, one = open_split(tmp_path / "a", "train"), open_split(tmp_path / "b", "train")
    for start, length in ((0, 1_000), (100, 2), (101, 101), (202, 500), (one.num_tokens - 3, 3)):
        assert np.array_equal(many.read(start, length), one.read(start, length))


def test_the_shortest_possible_split_works_and_a_shorter_one_is_refused(data_dir: Path) -> None:
    split = open_split(data_dir, "val")
    loader = TokenLoader(split, seq_len=split.num_tokens - 1, batch_size=2, seed=0)
    assert Counter(loader.window_start(i) for i in range(4)) == {0: 4}
    with pytest.raises(DataError, match=r"train\.seq_len is \d+ but the val split has only"):
        TokenLoader(split, seq_len=split.num_tokens, batch_size=2, seed=0)


def test_damaged_data_is_refused(data_dir: Path, tmp_path: Path) -> None:
    def copy() -> Path:
        return Path(shutil.copytree(data_dir, tmp_path / "copy", dirs_exist_ok=True))

    shard = copy() / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.bin: the content does not match"):
        open_split(shard.parent, "train")
    assert open_split(shard.parent, "train", verify=False).num_tokens * 2 == len(content)
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin: has \d+ bytes, not"):
        open_split(shard.parent, "train", verify=False)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: the shard is missing"):
        open_split(shard.parent, "train")
    manifest = copy() / "manifest.json"
    values = json.loads(manifest.read_text())
    values["vocab_size"] = 100
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match="beyond the vocabulary of 100"):
        open_split(manifest.parent, "train")
    values["splits"]["train"]["shards"][0]["file"] = "../train-00000.bin"
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match="not a file of this folder"):
        open_split(manifest.parent, "train")
    manifest.write_text("{")
    with pytest.raises(DataError, match="not a readable manifest"):
        open_split(manifest.parent, "train")
    with pytest.raises(DataError, match="run `python -m training prepare"):
        open_split(tmp_path / "absent", "train")
    with pytest.raises(DataError, match="no test split"):
        open_split(data_dir, "test")
