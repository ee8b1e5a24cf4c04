"""Order and coverage of the sequences, against a plain list of the split's tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.dataset import open_split
from training.data.loader import TokenLoader, permute
from training.data.prepare import PrepareRequest, prepare
from training.data.token_split import TokenSplit
from training.errors import DataError


def make_split(num_tokens: int, shard_tokens: int = 10**9) -> TokenSplit:
    """Tokens 0, 1, 2 … so that a sequence shows where it was taken from."""
    tokens = np.arange(num_tokens, dtype=np.uint32)
    shards = [tokens[start : start + shard_tokens] for start in range(0, num_tokens, shard_tokens)]
    return TokenSplit("train", shards, lambda: num_tokens)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_depends_on_the_key_and_is_not_the_identity() -> None:
    orders = {tuple(permute(index, 50, key) for index in range(50)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(50)) not in orders


def test_the_order_of_a_seed_never_changes() -> None:
    """A run that was interrupted must go on with the data it would have had: these starts are a promise."""
    packed = TokenLoader(make_split(2_000), seq_len=16, seed=1337)
    assert [packed.window_start(i) for i in (0, 1, 2, 3, 122, 123, 124, 10**6)] == [
        1757,
        205,
        1005,
        813,
        1741,
        1949,
        209,
        1443,
    ]
    sliding = TokenLoader(make_split(2_000), seq_len=16, seed=1337, stride=8)
    assert [sliding.window_start(i) for i in (0, 1, 2, 3, 247, 248, 249, 10**6)] == [
        872,
        1616,
        496,
        1600,
        1528,
        104,
        240,
        248,
    ]


@settings(deadline=None)
@given(
    num_tokens=st.integers(2, 400), seq_len=st.integers(1, 40), first=st.integers(0, 10**6), count=st.integers(1, 9),
    stride=st.none() | st.integers(1, 50), seed=st.integers(0, 2**63 - 1), shard_tokens=st.integers(1, 400),
)  # fmt: skip
def test_a_batch_is_windows_and_the_same_one_token_later(
    num_tokens: int, seq_len: int, first: int, count: int, stride: int | None, seed: int, shard_tokens: int
) -> None:
    seq_len = min(seq_len, num_tokens - 1)
    loader = TokenLoader(make_split(num_tokens, shard_tokens), seq_len, seed, stride)
    inputs, targets = loader.batch(first, count)
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((count, seq_len), np.int64, np.int64)
    for row in range(count):
        start = loader.window_start(first + row)
        assert inputs[row].tolist() == list(range(start, start + seq_len))
        assert targets[row].tolist() == list(range(start + 1, start + seq_len + 1))
        assert start + seq_len < num_tokens


@settings(deadline=None)
@given(num_tokens=st.integers(2, 500), seq_len=st.integers(1, 40), epoch=st.integers(0, 3), seed=st.integers(0, 2**40))
def test_an_epoch_of_packed_windows_is_every_token_once(num_tokens: int, seq_len: int, epoch: int, seed: int) -> None:
    seq_len = min(seq_len, num_tokens - 1)
    loader = TokenLoader(make_split(num_tokens), seq_len, seed)
    windows = loader.windows_per_epoch
    inputs, _ = loader.batch(epoch * windows, windows)
    seen = sorted(inputs.ravel().tolist())
    assert seen == list(range(seen[0], seen[0] + windows * seq_len))
    assert num_tokens - len(seen) <= 2 * seq_len


@settings(deadline=None)
@given(
    num_tokens=st.integers(2, 300), seq_len=st.integers(1, 40), stride=st.integers(1, 60), epoch=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_an_epoch_of_sliding_windows_is_each_of_them_once(
    num_tokens: int, seq_len: int, stride: int, epoch: int, seed: int
) -> None:
    seq_len = min(seq_len, num_tokens - 1)
    loader = TokenLoader(make_split(num_tokens), seq_len, seed, stride)
    windows = loader.windows_per_epoch
    inputs, _ = loader.batch(epoch * windows, windows)
    starts = sorted(inputs[:, 0].tolist())
    assert starts == list(range(0, num_tokens - seq_len, stride))  # as a loop over the text would cut them


def test_epochs_differ_in_order_and_packed_ones_in_phase() -> None:
    for stride in (None, 8):
        loader = TokenLoader(make_split(1_000), seq_len=16, seed=7, stride=stride)
        windows = loader.windows_per_epoch
        epochs = [tuple(loader.window_start(e * windows + i) for i in range(windows)) for e in range(4)]
        assert len(set(epochs)) == 4
        assert (len({min(starts) for starts in epochs}) > 1) == (stride is None)


@settings(deadline=None)
@given(ranks=st.sampled_from([1, 2, 3, 4]), batch_size=st.integers(1, 4), step=st.integers(0, 50))
def test_ranks_share_the_order_of_one_rank(ranks: int, batch_size: int, step: int) -> None:
    """Micro-batches dealt out to ranks are, together, the sequences that one process would have read."""
    loader = TokenLoader(make_split(700), seq_len=8, seed=3)
    first, per_step = step * 2 * ranks * batch_size, 2 * ranks * batch_size
    alone, _ = loader.batch(first, per_step)
    micro = {k * ranks + r: loader.batch(first + (k * ranks + r) * batch_size, batch_size)[0]
             for r in range(ranks) for k in range(2)}  # fmt: skip
    assert np.array_equal(np.concatenate([micro[m] for m in range(2 * ranks)]), alone)


def test_reads_cross_shards(text_file: Path, tmp_path: Path) -> None:
    prepare(PrepareRequest((str(text_file),), tmp_path / "a", "bytes"), shard_tokens=101)
    prepare(PrepareRequest((str(text_file),), tmp_path / "b", "bytes"))
    many, one = open_split(tmp_path / "a", "train"), open_split(tmp_path / "b", "train")
    assert many.num_bytes == one.num_bytes
    for start, length in ((0, 1_000), (100, 2), (101, 101), (202, 500), (one.num_tokens - 3, 3)):
        assert np.array_equal(many.read(start, length), one.read(start, length))


def test_the_shortest_possible_split_works_and_a_shorter_one_is_refused() -> None:
    loader = TokenLoader(make_split(50), seq_len=49, seed=0)
    assert Counter(loader.window_start(i) for i in range(4)) == {0: 4}
    with pytest.raises(DataError, match=r"train\.seq_len is 50 but the train split has only 50 tokens"):
        TokenLoader(make_split(50), seq_len=50, seed=0)
