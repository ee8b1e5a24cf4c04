"""Documents stay whole, apart and in order, and each split gets its share."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from tests.training.test_prepare import tokens_of
from training.cli import app
from training.data.encode import encode_batches, make_batches
from training.data.prepare import PrepareRequest, prepare
from training.data.readers import Piece
from training.data.shards import SplitWriter
from training.data.splits import Shares, Survey, split_documents, split_tail, tail_cuts
from training.errors import DataError, RecipeError

TEXTS = st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=12), min_size=1, max_size=30)


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def split_texts(texts: list[str], shares: Shares) -> dict[str, list[str]]:
    """The tail rule, applied to whole documents; what a split got, document by document."""
    survey = Survey()
    pieces = [Piece(text, True) for text in texts]
    for piece in pieces:
        survey.add(piece)
    found: dict[str, list[str]] = {}
    for name, piece in split_tail(pieces, tail_cuts(survey, shares), shares.names):
        assert piece.starts
        assert piece.text
        found.setdefault(name, []).append(piece.text)
    return found


@settings(deadline=None)
@given(TEXTS, st.floats(0.05, 0.5), st.floats(0.05, 0.45) | st.just(0.0))
def test_the_tail_rule_keeps_the_text_and_the_shares(texts: list[str], val: float, test: float) -> None:
    found = split_texts(texts, Shares(val, test))
    joined = ["".join(found.get(name, [])) for name in ("train", "val", "test")]
    assert "".join(joined) == "".join(texts)
    total, smallest = len("".join(texts)), min(val, test or 1.0, 1.0 - val - test)
    for text, share in zip(joined, (1.0 - val - test, val, test), strict=True):
        assert abs(len(text) - share * total) <= 2 * 0.1 * smallest * total + 1


def test_a_cut_moves_to_the_end_of_a_document_nearby_but_not_far() -> None:
    assert split_texts(["x" * 10] * 100, Shares(0.104, 0.1)) == {
        "train": ["x" * 10] * 80, "val": ["x" * 10] * 10, "test": ["x" * 10] * 10
    }  # fmt: skip
    assert split_texts(["x" * 1000], Shares(0.1, 0.1)) == {
        "train": ["x" * 800],
        "val": ["x" * 100],
        "test": ["x" * 100],
    }


def test_a_survey_of_many_documents_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.splits._ENDS_KEPT", 64)
    survey = Survey()
    for _ in range(5_000):
        survey.add(Piece("abc", True))
    assert len(survey.ends) <= 64
    assert all(end % 3 == 0 for end in survey.ends)
    assert abs(tail_cuts(survey, Shares(0.1, 0.0))[0] - 13_500) <= 150


def test_documents_go_where_their_hash_says() -> None:
    texts = [f"name {i}" for i in range(20_000)]
    shares = Shares(0.1, 0.2)
    found = {name: {p.text for n, p in split_documents((Piece(t, True) for t in texts), shares) if n == name}
             for name in shares.names}  # fmt: skip
    # 4 standard deviations of a binomial distribution
    assert abs(len(found["val"]) - 2_000) < 170
    assert abs(len(found["test"]) - 4_000) < 230
    again = dict.fromkeys(reversed([*texts, *(f"other {i}" for i in range(100))]))
    moved = {p.text for name, p in split_documents((Piece(t, True) for t in again), shares) if name == "val"}
    assert {text for text in moved if text.startswith("name")} == found["val"]


@settings(deadline=None)
@given(TEXTS, st.integers(1, 30))
def test_tokens_are_those_of_each_document_with_a_separator_between(texts: list[str], characters: int) -> None:
    tokenizer = Tokenizer.gpt2()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.encode._BATCH_CHARACTERS", characters)
        pieces = split_documents((Piece(text, True) for text in texts), Shares(0.3, 0.2))
        placed = list(pieces)
        encoded = list(encode_batches(make_batches(placed, lambda: 0), tokenizer, Path(), workers=1))
    for split in ("train", "val", "test"):
        expected: list[int] = []
        for text in (piece.text for name, piece in placed if name == split):
            expected += ([50_256] if expected else []) + tokenizer.encode(text)
        assert [i for item in encoded if item.batch.split == split for i in item.tokens.tolist()] == expected
    assert sum(item.num_bytes for item in encoded) == len("".join(texts))


def test_names_by_line_in_three_splits(tmp_path: Path) -> None:
    names = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    request = PrepareRequest(
        (str(tmp_path / "names.txt"),), tmp_path / "out", "char", test_fraction=0.1, documents="line"
    )
    manifest, _ = prepare(request)
    assert manifest.split == "documents"
    separator = manifest.vocab_size - 1
    tokenizer, found = Tokenizer.load(tmp_path / "out/tokenizer"), []
    for name, info in manifest.splits.items():
        tokens = tokens_of(tmp_path / "out", name)
        assert tokens.count(separator) == info.documents - 1
        text = "|".join(tokenizer.decode(part) for part in _parts(tokens, separator))
        found += text.split("|")
    assert list(manifest.splits) == ["train", "val", "test"]
    assert sorted(found) == sorted(names)
    assert prepare(request) == (manifest, False)
    for change in ({"documents": "blank-line"}, {"test_fraction": 0.2}, {"split": "tail"}):
        with pytest.raises(DataError, match="already holds other prepared data"):
            prepare(dataclasses.replace(request, **change))


def test_the_command_line_takes_every_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems/a.jsonl").write_text(
        '{"title": "स्याही", "body": "naïve"}\n' * 3 + '{"title": "", "body": "x"}\n'
    )
    (tmp_path / "poems/b.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "poems/c.png").write_bytes(b"x")
    arguments = [
        "prepare", "--input", str(tmp_path / "poems"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes",
        "--val-fraction", "0.2", "--test-fraction", "0.2", "--split", "tail", "--documents", "blank-line",
        "--text-key", "title", "--text-key", "body", "--workers", "1", "--json",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        app(arguments, prog_name="training")
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    # Cut at characters 31 and 41 of 52, of which the second moves to the end of a document at 40.
    assert [result[split]["documents"] for split in ("train", "val", "test")] == [3, 2, 2]
    assert "1 of 3 files, first c.png" in printed.err
    text = bytes(
        token if token < 256 else 0 for s in ("train", "val", "test") for token in tokens_of(tmp_path / "out", s)
    )
    assert text.decode().replace("\0", "") == "स्याही\n\nnaïve" * 3 + "xone\ntwothree"


def _parts(tokens: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts.append([]) if token == separator else parts[-1].append(token)
    return parts


def test_eighty_ten_ten_of_one_text(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1_000))
    (tmp_path / "a.txt").write_text(text)
    prepare(PrepareRequest((str(tmp_path / "a.txt"),), tmp_path / "out", "bytes", 0.1, 0.1))
    cuts = (int(len(text) * 0.8), int(len(text) * 0.9))
    parts = (text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :])
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        assert bytes(tokens_of(tmp_path / "out", name)).decode() == part


def test_two_workers_write_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.encode._BATCH_CHARACTERS", 200)
    item = write_jsonl(tmp_path / "a.jsonl", [f"document {i}: नमस्ते {'word ' * (i % 7)}" for i in range(300)])
    done: list[int] = []
    one, _ = prepare(PrepareRequest((item,), tmp_path / "one", "gpt2", test_fraction=0.1, workers=1))
    two, _ = prepare(
        PrepareRequest((item,), tmp_path / "two", "gpt2", test_fraction=0.1, workers=2),
        on_progress=lambda what, read, total: done.append(read),
    )
    assert one.splits == two.splits
    assert done == sorted(done)
    assert done[-1] == (tmp_path / "a.jsonl").stat().st_size


def test_a_worker_that_dies_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.encode._BATCH_CHARACTERS", 10)
    item = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(300)])

    def kill(what: str, done: int, total: int | None) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(DataError, match="a tokenising process was ended from outside"):
        prepare(PrepareRequest((item,), tmp_path / "out", "bytes", workers=2), on_progress=kill)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_wrong_shares_are_refused() -> None:
    with pytest.raises(RecipeError, match="--test-fraction is"):
        PrepareRequest(("a",), Path("out"), test_fraction=0.9)
    with pytest.raises(RecipeError, match="--text-key is empty"):
        PrepareRequest(("a",), Path("out"), text_keys=("",))


@pytest.mark.parametrize("name", ["one-document.txt", "rows.jsonl"])
def test_memory_does_not_grow_with_the_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the text, read and encoded, costs no more memory than a tenth of it does."""
    monkeypatch.setattr("training.data.readers._CHUNK", 1 << 14)
    monkeypatch.setattr("training.data.encode._BATCH_CHARACTERS", 1 << 14)
    words = "some words " * 50
    make = f"line {{}} {words}\n".format if name.endswith(".txt") else f'{{{{"text": "row {{}} {words}"}}}}\n'.format
    peaks = []
    for megabytes in (1, 10):
        path = tmp_path / f"{megabytes}-{name}"
        path.write_text("".join(map(make, range(megabytes * (1 << 20) // len(make(9_999))))))
        tracemalloc.start()
        prepare(PrepareRequest((str(path),), tmp_path / f"{megabytes}", "bytes", workers=1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)
    assert peaks[1] < 3 << 20


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: writing fails in the middle of a shard."""
    (tmp_path / "a.txt").write_text("some text\n" * 20_000)
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from training.cli import main\n"
        f"sys.argv = ['x', 'prepare', '--input', {str(tmp_path / 'a.txt')!r}, '--out', {str(tmp_path / 'out')!r},\n"
        "            '--tokenizer', 'bytes']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "out cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_shards_are_cut_anywhere(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "train", "uint16", shard_tokens=4) as writer:
        writer.append(np.arange(6, dtype=np.uint16), num_bytes=6, characters=6, documents=1)
        writer.append(np.arange(6, 9, dtype=np.uint16), num_bytes=3, characters=3, documents=2)
        info = writer.finish()
    assert [shard.tokens for shard in info.shards] == [4, 4, 1]
    assert (info.tokens, info.bytes, info.documents) == (9, 9, 3)
    data = b"".join((tmp_path / shard.file).read_bytes() for shard in info.shards)
    assert np.frombuffer(data, dtype="<u2").tolist() == list(range(9))
