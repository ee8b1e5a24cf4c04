"""Prepared data against nanoGPT-style oracles computed by hand, and every way the input can be wrong."""

from __future__ import annotations

import functools
import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import QuillError
from model.tokenizer import Tokenizer
from tests.training.conftest import make_text
from training.data.prepare import PrepareRequest, prepare
from training.data.readers import cut_text
from training.data.shards import data_digest, read_manifest
from training.errors import DataError, RecipeError


def tokens_of(folder: Path, split: str) -> list[int]:
    manifest = read_manifest(folder)
    parts = [np.fromfile(folder / shard.file, manifest.token_dtype) for shard in manifest.splits[split].shards]
    return np.concatenate(parts).tolist()


@functools.cache
def tiktoken_gpt2() -> tiktoken.Encoding:
    """tiktoken itself, with GPT-2's published pattern, as the oracle."""
    tokenizer = Tokenizer.gpt2()
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ranks = {tokenizer.token_bytes(i): i for i in range(50_256)}
    return tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256})


@pytest.mark.parametrize("name", ["gpt2", "bytes", "char"])
def test_splits_are_the_encoded_first_and_last_tenths(name: str, text_file: Path, tmp_path: Path) -> None:
    manifest, written = prepare(PrepareRequest((str(text_file),), tmp_path / "out", name))
    text = text_file.read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    tokenizer = {"gpt2": Tokenizer.gpt2(), "bytes": Tokenizer.bytes(), "char": Tokenizer.characters(text)}[name]
    assert written
    assert tokens_of(tmp_path / "out", "train") == tokenizer.encode(text[:cut])
    assert tokens_of(tmp_path / "out", "val") == tokenizer.encode(text[cut:])
    assert (manifest.splits["train"].characters, manifest.splits["val"].characters) == (cut, len(text) - cut)
    assert manifest.splits["val"].bytes == len(text[cut:].encode())
    assert manifest.dtype == "uint16"
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").digest == manifest.tokenizer_digest == tokenizer.digest


def test_manifest_states_the_digest_of_every_shard(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest, _ = prepare(PrepareRequest((str(text_file),), out, "bytes"), shard_tokens=1_000)
    whole, _ = prepare(PrepareRequest((str(text_file),), tmp_path / "whole", "bytes"))
    assert [shard.tokens for shard in manifest.splits["train"].shards[:-1]] == [1_000] * (
        manifest.splits["train"].tokens // 1_000
    )
    for split in manifest.splits.values():
        for shard in split.shards:
            assert hashlib.sha256((out / shard.file).read_bytes()).hexdigest() == shard.sha256
    assert tokens_of(out, "train") == tokens_of(tmp_path / "whole", "train")
    assert whole.sources[0].sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert data_digest(manifest) != data_digest(whole)
    (tmp_path / "moved.txt").write_bytes(text_file.read_bytes())
    moved, _ = prepare(PrepareRequest((str(tmp_path / "moved.txt"),), tmp_path / "moved", "bytes"))
    assert data_digest(moved) == data_digest(whole)
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    assert {path.name for path in out.iterdir()} == {"manifest.json", "tokenizer", *listed}


@settings(deadline=None)
@given(st.text(st.sampled_from(list("ab'st 1.,  \n\n\t\r\u00a0\u2003\u0085\x1cé字🖋")), max_size=60), st.integers(1, 20))
def test_text_in_pieces_encodes_like_the_whole(text: str, size: int) -> None:
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(cut_text(chunks, "never")) == ([text] if text else [])
    assert "".join(cut_text(chunks, "words")) == "".join(cut_text(chunks, "anywhere")) == text
    ordinary = tiktoken_gpt2().encode_ordinary
    assert [i for piece in cut_text(chunks, "words") for i in ordinary(piece)] == ordinary(text)


def test_long_text_really_comes_in_pieces() -> None:
    text = make_text(800, seed=3)
    chunks = [text[start : start + 97] for start in range(0, len(text), 97)]
    assert len(list(cut_text(chunks, "words"))) > len(chunks) * 0.9
    assert list(cut_text(chunks, "anywhere")) == chunks


def test_documents_are_separated_by_end_of_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", "one two"), ("b.txt", "three four five"), ("c.txt", "six")):
        (tmp_path / name).write_text(content)
    inputs = tuple(str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt"))
    prepare(PrepareRequest(inputs, tmp_path / "out", "bytes", val_fraction=0.5))
    end = [256]
    assert tokens_of(tmp_path / "out", "train") == [*b"one two", *end, *b"three"]
    assert tokens_of(tmp_path / "out", "val") == [*b" four five", *end, *b"six"]


def test_workers_give_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.readers._CHUNK", 500)
    monkeypatch.setattr("training.data.encode._BATCH_CHARACTERS", 900)
    (tmp_path / "a.txt").write_text(make_text(600, seed=5), encoding="utf-8")
    one, _ = prepare(PrepareRequest((str(tmp_path / "a.txt"),), tmp_path / "one", "bytes"))
    two, _ = prepare(PrepareRequest((str(tmp_path / "a.txt"),), tmp_path / "two", "bytes", workers=2))
    assert one.splits == two.splits


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    alphabet = "".join(map(chr, range(0x4E00, 0x9FFF))) + "".join(map(chr, range(0x20000, 0x2B000)))
    (tmp_path / "a.txt").write_text(alphabet + alphabet[::-1], encoding="utf-8")
    manifest, _ = prepare(PrepareRequest((str(tmp_path / "a.txt"),), tmp_path / "out", "char"))
    assert manifest.dtype == "uint32"
    assert manifest.vocab_size == len(alphabet) + 1
    assert max(tokens_of(tmp_path / "out", "train")) == len(alphabet) - 1


def test_preparing_again_changes_nothing_and_other_data_is_kept(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, _ = prepare(PrepareRequest((str(text_file),), out, "bytes"))
    again, written = prepare(PrepareRequest((str(text_file),), out, "bytes"))
    assert (again, written) == (first, False)
    with pytest.raises(DataError, match="already holds other prepared data"):
        prepare(PrepareRequest((str(text_file),), out, "char"))
    assert read_manifest(out) == first
    replaced, written = prepare(PrepareRequest((str(text_file),), out, "char", force=True))
    assert written
    assert replaced.tokenizer == "characters"


def test_bad_input_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[dict[str, object], type[QuillError], str]] = [
        ({"inputs": (str(tmp_path / "absent.txt"),)}, DataError, "absent.txt: no such file"),
        ({"inputs": (str(tmp_path / "damaged"),)}, DataError, r"damaged.tokenizer\.json, item 1: not a JSON object"),
        ({"inputs": (str(tmp_path / "nothing"),)}, DataError, "holds no file that ends in"),
        ({"inputs": (str(tmp_path / "empty.txt"),)}, DataError, "the file is empty"),
        ({"inputs": (str(tmp_path / "one.txt"),)}, DataError, "split would be empty"),
        ({"inputs": (str(tmp_path / "latin1.txt"),)}, DataError, "not UTF-8"),
        ({"inputs": ()}, RecipeError, "names no text"),
        ({"inputs": ("https://example.invalid/a.txt",)}, RecipeError, "needs --sha256"),
        ({"digests": ("0" * 64,)}, RecipeError, "more often"),
        ({"tokenizer": "nonesuch"}, RecipeError, "--tokenizer nonesuch"),
        ({"tokenizer": str(tmp_path / "damaged")}, QuillError, "tokenizer.json"),
    ]
    for changes, error, message in cases:
        values: dict[str, object] = {"inputs": (str(tmp_path / "one.txt"),), "out": tmp_path / "out"} | changes
        with pytest.raises(error, match=message):
            prepare(PrepareRequest(**{"tokenizer": "bytes", **values}))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="--val-fraction"):
        PrepareRequest(("a",), tmp_path / "out", val_fraction=1.0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"empty.txt", "one.txt", "latin1.txt", "damaged", "nothing"}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "www"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/x", "http://127.0.0.1/a b", "http://127.0.0.1/ä.txt"])
def test_an_address_that_cannot_be_asked_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be downloaded"):
        prepare(PrepareRequest((url,), tmp_path / "out", "bytes", digests=("0" * 64,)))


def test_a_download_that_finds_no_room_is_told(
    website: tuple[str, Path], tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = website
    (folder / "a.txt").write_bytes(content := make_text(50).encode())
    original = Path.open

    def opened(path: Path, *args: Any, **options: Any) -> Any:
        return original(full_disk if path.name == "a.txt.part" else path, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    request = PrepareRequest(
        (f"{url}/a.txt",), tmp_path / "out", "bytes", digests=(hashlib.sha256(content).hexdigest(),)
    )
    with pytest.raises(DataError, match=r"cannot hold the download \(No space left on device\); let TMPDIR name"):
        prepare(request)
    assert not (tmp_path / "out").exists()


def test_a_download_is_used_only_with_its_digest(website: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = website
    content = make_text(50).encode()
    (folder / "a.txt").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest, _ = prepare(PrepareRequest((f"{url}/a.txt",), tmp_path / "out", "bytes", digests=(digest,)))
    assert manifest.sources[0].sha256 == digest
    assert bytes(tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "val")) == content
    (folder / "a.txt").rename(folder / "moved.txt")
    again = PrepareRequest((f"{url}/a.txt",), tmp_path / "out", "bytes", digests=(digest,))
    assert prepare(again) == (manifest, False)  # nothing is downloaded for what is already there
    (folder / "moved.txt").rename(folder / "a.txt")
    with pytest.raises(DataError, match=r"sha256 is .* not 0000"):
        prepare(PrepareRequest((f"{url}/a.txt",), tmp_path / "other", "bytes", digests=("0" * 64,)))
    with pytest.raises(DataError, match="cannot be downloaded"):
        prepare(PrepareRequest((f"{url}/b.txt",), tmp_path / "other", "bytes", digests=(digest,)))
    assert not (tmp_path / "other").exists()
    (folder / "b.jsonl.gz").write_bytes(packed := gzip.compress(b'{"text": "one"}\n{"text": "two"}'))
    request = PrepareRequest(
        (f"{url}/b.jsonl.gz?download=1",), tmp_path / "rows", "bytes", 0.5, split="tail",
        digests=(hashlib.sha256(packed).hexdigest(),),
    )  # fmt: skip
    prepare(request)
    assert [bytes(tokens_of(tmp_path / "rows", split)) for split in ("train", "val")] == [b"one", b"two"]
