"""Every kind of input gives the documents that the library which wrote it would read, or one clear error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import QuillError
from training.data.compressed import Meter
from training.data.prepare import PrepareRequest, prepare
from training.data.readers import ReadOptions, read_file
from training.data.sources import check_inputs
from training.errors import DataError, RecipeError

TEXTS = ["one two", "नमस्ते\n\ndunia", "", 'quote " and \\ 🖋', "x" * 3_000]


def documents(path: Path, **options: object) -> list[str]:
    """The pieces that are read, joined to documents."""
    found: list[str] = []
    for text, starts, _ in read_file(path, path.name, ReadOptions(**options), Meter()):  # type: ignore[arg-type]
        found.append(text) if starts else found.append(found.pop() + text)
    return found


def compress(path: Path, suffix: str) -> Path:
    """A compressed copy; zstandard in two frames, gzip in two members, as parallel compressors write them."""
    data = path.read_bytes()
    pack: Callable[[bytes], bytes] = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    target = path.with_name(path.name + suffix)
    target.write_bytes(pack(data[:1_000]) + pack(data[1_000:]))
    return target


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_documents_of_every_format(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.txt":
        path.write_bytes("\r\n".join(TEXTS).encode())
        expected = ["\r\n".join(TEXTS)]
    else:
        write_rows(path, [{"id": i, "text": text, "more": {"a": [1]}} for i, text in enumerate(TEXTS)])
        expected = [text for text in TEXTS if text]
    path = compress(path, suffix) if suffix else path
    meter = Meter()
    assert documents(path) == expected
    assert [piece.text for piece in read_file(path, "a", ReadOptions(), meter)] == expected
    assert meter.done >= path.stat().st_size  # the bar reaches its end


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_the_fields_of_a_row_are_joined_by_empty_lines(name: str, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"q": "Why?", "c": "", "a": "So."}, {"q": "And?", "c": None, "a": ""}]
    assert documents(write_rows(tmp_path / name, rows), text_keys=("q", "c", "a")) == ["Why?\n\nSo.", "And?"]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8), st.integers(1, 40))
def test_json_is_read_whole_whatever_the_chunks(texts: list[str], chunk: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.readers._CHUNK", chunk)
        wanted = [text for text in texts if text]
        for name in ("a.json", "a.jsonl"):
            path = write_rows(Path(folder) / name, [{"text": text} for text in texts])
            assert documents(path, cut="anywhere") == wanted


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n\n{"text": "a"}\n{"text": "b"}\n')
    assert documents(tmp_path / "a.json") == ["a", "b"]


def test_lines_and_paragraphs_as_documents(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"emma\r\n\r\nolivia x\n  \n\nava\nmia")
    assert documents(path, documents="line") == ["emma", "olivia x", "ava", "mia"]
    assert documents(path, documents="blank-line") == ["emma", "olivia x", "ava\nmia"]
    assert documents(path) == ["emma\r\n\r\nolivia x\n  \n\nava\nmia"]


def test_a_folder_is_its_known_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name in ("b.txt", "a/z.md", "a/a.jsonl", ".git/c.txt", "image.png", "empty.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}' if name != "empty.txt" else "")
    notices: list[str] = []
    found = check_inputs([str(folder)], (), notices.append)
    assert [item.origin for item in found] == ["corpus/a/a.jsonl", "corpus/a/z.md", "corpus/b.txt"]
    assert notices == [f"{folder}: left out, as empty or of an unknown kind: 2 of 5 files, first empty.txt"]


BAD = {
    "no-json.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"no-json\.jsonl, line 3: not a JSON object"),
    "array.jsonl": (b"[1]\n", r"array\.jsonl, line 1: not a JSON object"),
    "no-key.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', r"line 2: has no 'text'.*--text-key \(body\)"),
    "number.jsonl": (b'{"text": 7}\n', r"line 1: 'text' is int, not text"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', r"latin\.jsonl, line 1: not"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"half\.jsonl, line 1: "),
    "half.json": (b'[{"text": "\\ud800"}]', r"half\.json, item 1: holds half of a surrogate pair"),
    "cut.json": (b'[{"text": "a"}, {"text": "b', r"cut\.json, item 2: not a JSON object"),
    "deep.json": (b'[{"text": ' + b"[" * 100_000, r"deep\.json, item 1: not a JSON object"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, r"deep\.jsonl, line 1: not a JSON object"),
    "latin.txt": (b"caf\xe9 au lait", r"latin\.txt: not UTF-8 text \(byte 0xe9\)"),
    "cut.txt": (b"half a letter \xc3", r"cut\.txt: not UTF-8 text"),
    "no.parquet": (b"PAR1 nothing PAR1", r"no\.parquet: not a readable parquet file"),
    "no.txt.gz": (b"plain text", r"no\.txt\.gz: damaged or no \.gz file"),
    "cut.txt.gz": (gzip.compress(b"text" * 999)[:-9], r"cut\.txt\.gz: damaged"),
    "flipped.txt.gz": (gzip.compress(b"text" * 999)[:-6] + b"123456", r"flipped\.txt\.gz: damaged"),
    "no.txt.zst": (b"plain text", r"no\.txt\.zst: damaged or no \.zst file"),
    "cut.txt.zst": (zstandard.compress(b"text" * 999)[:-3], r"cut\.txt\.zst: damaged.*ends within"),
    "more.txt.zst": (zstandard.compress(b"text" * 999) + b"more", r"more\.txt\.zst: damaged"),
    "blank.jsonl": (b'{"text": ""}\n', "would be empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_error_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(PrepareRequest((str(tmp_path / name),), tmp_path / "out", "bytes", split="documents"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_columns_and_datasets_are_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    parquet = write_rows(tmp_path / "a.parquet", [{"body": "x", "id": 1}])
    broken = tmp_path / "broken.parquet"
    latin = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), broken)
    cases: list[tuple[str, tuple[str, ...], type[QuillError], str]] = [
        (str(parquet), ("text",), DataError, r"a\.parquet: has no column 'text'.*\(body, id\)"),
        (str(parquet), ("id",), DataError, r"a\.parquet, row 1: 'id' is int, not text"),
        (str(broken), ("text",), DataError, r"broken\.parquet: not UTF-8 text"),
        ("hf:@", ("text",), RecipeError, "not of the form hf:OWNER/NAME"),
    ]
    for item, keys, error, message in cases:
        with pytest.raises(error, match=message):
            prepare(PrepareRequest((item,), tmp_path / "out", "bytes", text_keys=keys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_a_library_that_is_not_installed_is_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, library, None)
    item, extra = (str(tmp_path / "a.parquet"), "parquet") if library == "pyarrow" else ("hf:a/b", "datasets")
    with pytest.raises(RecipeError, match=f"install quill's extra `{extra}`"):
        prepare(PrepareRequest((item,), tmp_path / "out", "bytes"))
