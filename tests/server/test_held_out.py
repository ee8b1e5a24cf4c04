"""The text that checkpoints are compared by, from each of its sources."""

from __future__ import annotations

import itertools
import json
from array import array
from pathlib import Path

import pytest

from model.tokenizer import Tokenizer
from server.held_out import BUILT_IN, WINDOW, WatchError, make_sample

BYTES = Tokenizer.bytes()


def joined(windows: list[list[int]]) -> list[int]:
    """The tokens; each window begins with the last one of the window before."""
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(windows))
    return [windows[0][0], *(token for window in windows for token in window[1:])]


def test_a_given_text_is_predicted_once_each(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("abcé " * 100)
    sample = make_sample(tmp_path, path, BYTES, 1024)
    assert joined(sample.windows) == BYTES.encode("abcé " * 100)
    assert max(map(len, sample.windows)) == WINDOW + 1
    assert sample.canary == BYTES.encode("abcé " * 100)[:16]
    assert max(len(window) for window in make_sample(tmp_path, path, BYTES, 10).windows) == 11
    path.write_text("x" * 3_000_000)
    assert len(make_sample(tmp_path, path, BYTES, 1024).windows) == 48


def test_ours_where_there_is_none(tmp_path: Path) -> None:
    assert joined(make_sample(tmp_path, None, BYTES, 1024).windows) == BYTES.encode(BUILT_IN)


@pytest.mark.parametrize(
    ("content", "tokenizer", "words"),
    [
        (None, BYTES, "cannot be read"),
        (b"a", BYTES, "fewer than two tokens"),
        (b"xyz", Tokenizer.characters("ab"), "does not fit the model's tokenizer"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, content: bytes | None, tokenizer: Tokenizer, words: str) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(WatchError, match=r"--watch-text[^\n]+$") as error:
        make_sample(tmp_path, tmp_path / "text", tokenizer, 64)
    assert words in str(error.value)


def prepared(root: Path, tokenizer: Tokenizer, ids: list[int], dtype: str = "uint16") -> Path:
    """What `training prepare` and `train` leave of it."""
    data = root / "data"
    data.mkdir(exist_ok=True)
    (data / "val-00000.bin").write_bytes(array("H" if dtype == "uint16" else "I", ids).tobytes())
    shards = [{"file": "val-00000.bin", "tokens": len(ids), "sha256": ""}]
    manifest = {"tokenizer_digest": tokenizer.digest, "dtype": dtype, "splits": {"val": {"shards": shards}}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    (root / "config.toml").write_text(f'[data]\ndir = "{data}"\n')
    return root


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_runs_own_held_out_tokens(tmp_path: Path, dtype: str) -> None:
    ids = [number % 251 for number in range(1000)]
    root = prepared(tmp_path, BYTES, ids, dtype)
    assert joined(make_sample(root, None, BYTES, 1024).windows) == ids


@pytest.mark.parametrize("harm", ["tokens", "tokenizer", "file", "manifest", "shape", "outside"])
def test_data_that_cannot_be_read_is_passed_over(tmp_path: Path, harm: str) -> None:
    root = prepared(
        tmp_path, Tokenizer.characters("ab") if harm == "tokenizer" else BYTES, [5000 if harm == "tokens" else 5] * 9
    )
    path = root / "data" / "manifest.json"
    match harm:
        case "file":
            (root / "data" / "val-00000.bin").unlink()
        case "manifest":
            path.write_text("{")
        case "shape":
            path.write_text('{"splits": []}')
        case "outside":
            path.write_text(path.read_text().replace("val-00000.bin", "../data/val-00000.bin"))
    assert joined(make_sample(root, None, BYTES, 1024).windows) == BYTES.encode(BUILT_IN)
