"""Documents out of files: plain text, JSON lines, JSON arrays, parquet; each also compressed. Free of torch.

Everything is read as a stream. A long text comes in pieces that may be encoded one by one: `Cut` says where the
tokenizer at hand allows that.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import msgspec

from model.controls import Label
from training.data.compressed import SUFFIXES as COMPRESSED_SUFFIXES
from training.data.compressed import Meter, open_bytes
from training.data.labels import row_labels
from training.data.scratch import append_scratch
from training.errors import DataError, RecipeError

Documents = Literal["file", "line", "blank-line"]
# bytes and characters never join over a cut; GPT-2's words begin with their space or line end, see _WORD_CUT.
Cut = Literal["anywhere", "words", "never"]
FormatKind = Literal["text", "jsonl", "json", "parquet"]

_FORMATS: dict[str, FormatKind] = {
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".tex": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
KNOWN_SUFFIXES = tuple(_FORMATS)
_CHUNK = 1 << 20
_ROWS_AT_A_TIME = 1024
# The last space or line end of a text that something visible follows. GPT-2's pattern always begins a word at such a
# place, whatever precedes it: a run of white space gives its last character to the next word or leaves it alone.
_WORD_CUT = re.compile(r".*(?=[ \n]\S)", re.DOTALL)
_JSON_GAP = re.compile(r"[\s,]*")


class Piece(NamedTuple):
    """Text that is encoded on its own; `starts` where it begins a document. `labels` are those of its document."""

    text: str
    starts: bool
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """`documents` divides plain text; `text_keys` are the fields of a row that hold text, joined by empty lines, and
    `control_keys` those that hold a label, in the order in which labels stand before the text."""

    documents: Documents = "file"
    text_keys: tuple[str, ...] = ("text",)
    cut: Cut = "never"
    control_keys: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.text_keys + self.control_keys))


@dataclass(frozen=True, slots=True)
class FileFormat:
    kind: FormatKind
    is_known: bool


def file_format(name: str) -> FileFormat:
    """By the end of a file's name; a name that says nothing is plain text."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    return FileFormat(_FORMATS.get(suffix, "text"), suffix in _FORMATS)


def read_file(path: Path, origin: str, options: ReadOptions, meter: Meter) -> Iterator[Piece]:
    """The documents of a file, empty ones left out. Raises DataError, naming `origin` and the row, for bad content."""
    kind = file_format(path.name).kind
    with open_bytes(path, origin, meter) as stream:
        if kind == "text":
            yield from _read_text(stream, origin, options)
            return
        if kind == "jsonl":
            rows = _jsonl_rows(stream, origin, options.keys)
        elif kind == "json":
            rows = _json_rows(stream, origin)
        else:
            rows = _parquet_rows(stream, path, origin, options, meter)
        for place, row in rows:
            labels = row_labels(row, place, options.control_keys)
            yield from document_pieces(row_text(row, place, options.text_keys), options.cut, labels)


def read_rows(path: Path, origin: str, keys: tuple[str, ...], meter: Meter) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of JSON lines or of a JSON array, each with its place; of the fields only `keys` need be decoded.

    Raises DataError, naming `origin` and the row, for bad content and for files of other kinds.
    """
    kind = file_format(path.name).kind
    with open_bytes(path, origin, meter) as stream:
        if kind == "jsonl":
            yield from _jsonl_rows(stream, origin, keys)
        elif kind == "json":
            yield from _json_rows(stream, origin)
        else:
            raise DataError(f"{origin}: not rows of JSON; name a file that ends in .jsonl or .json, or these with .gz")


def document_pieces(text: str, cut: Cut, labels: tuple[Label, ...] = ()) -> Iterator[Piece]:
    """A document that is in memory; none if it is empty."""
    if len(text) <= _CHUNK:
        if text:
            yield Piece(text, True, labels)
        return
    parts = (text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK))
    for number, part in enumerate(cut_text(parts, cut)):
        yield Piece(part, number == 0, labels)


def row_text(row: Mapping[str, Any], place: str, keys: tuple[str, ...]) -> str:
    """The row's text: the fields `keys` that are not empty. Raises DataError, naming `place`, if one is no text."""
    texts = []
    for key in keys:
        if key not in row:
            known = ", ".join(sorted(row)) or "none"
            raise DataError(f"{place}: has no {key!r}; name the field that holds the text with --text-key ({known})")
        value = row[key]
        if not isinstance(value, str | None):
            raise DataError(f"{place}: {key!r} is {type(value).__name__}, not text; name another field by --text-key")
        if value:
            texts.append(_require_unicode(value, place))
    return "\n\n".join(texts)


def cut_text(chunks: Iterable[str], cut: Cut) -> Iterator[str]:
    """The text of the chunks in pieces that encode to what the whole does."""
    waiting: list[str] = []
    for chunk in chunks:
        end = _last_cut(chunk, cut)
        waiting.append(chunk[:end])
        if end and any(waiting):
            yield "".join(waiting)
            waiting = []
        waiting.append(chunk[end:])
    if rest := "".join(waiting):
        yield rest


def _last_cut(chunk: str, cut: Cut) -> int:
    """Where the chunk may be cut last; 0 for nowhere inside it."""
    if cut == "anywhere":
        return len(chunk)
    match = _WORD_CUT.match(chunk) if cut == "words" else None
    return match.end() if match else 0


def _read_text(stream: BinaryIO, origin: str, options: ReadOptions) -> Iterator[Piece]:
    try:
        # Whole files keep their line ends.
        newline = "" if options.documents == "file" else None
        with io.TextIOWrapper(stream, encoding="utf-8", newline=newline) as file:
            yield from _text_documents(file, options)
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 text (byte {error.object[error.start]:#x}); convert it first") from None


def _text_documents(file: io.TextIOWrapper, options: ReadOptions) -> Iterator[Piece]:
    if options.documents == "file":
        for number, text in enumerate(cut_text(iter(lambda: file.read(_CHUNK), ""), options.cut)):
            yield Piece(text, number == 0)
        return
    for text in file if options.documents == "line" else _paragraphs(file):
        if text.strip():
            yield from document_pieces(text.rstrip("\n"), options.cut)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Groups of neighbouring lines with something on them."""
    group: list[str] = []
    for line in lines:
        if line.strip():
            group.append(line)
        elif group:
            yield "".join(group)
            group = []
    yield "".join(group)


def _jsonl_rows(stream: BinaryIO, origin: str, keys: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Only the fields asked for are decoded; the rest is looked over."""
    decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"{origin}, line {number}"
        try:
            row = decoder.decode(line)
            yield place, {key: msgspec.json.decode(value) if key in keys else value for key, value in row.items()}
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 text ({error.reason}); convert the file first") from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"{place}: not a JSON object ({error}); every line must be one") from None


def _json_rows(stream: BinaryIO, origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of an array, or objects one behind the other."""
    decoder, number, wanted = json.JSONDecoder(), 0, _CHUNK
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as file:
            chunk = file.read(_CHUNK)
            buffer = chunk.lstrip().removeprefix("[")
            while chunk:
                position = 0
                for row, end in _whole_objects(decoder, buffer):
                    number, position = number + 1, end
                    yield f"{origin}, item {number}", row
                wanted = _CHUNK if position else 2 * wanted
                chunk = file.read(wanted)
                buffer = buffer[position:] + chunk
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 text ({error.reason}); convert it first") from None
    if _JSON_GAP.sub("", buffer, count=1).strip() not in ("", "]"):
        raise DataError(f"{origin}, item {number + 1}: not a JSON object; the file must hold an array of objects")


def _whole_objects(decoder: json.JSONDecoder, buffer: str) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The objects that the buffer holds from its start on, each with its end."""
    position = 0
    while True:
        start = cast(re.Match[str], _JSON_GAP.match(buffer, position)).end()
        if not buffer.startswith("{", start):
            return
        try:
            row, position = decoder.raw_decode(buffer, start)
        except (ValueError, RecursionError):  # more of it is to come, or the file is damaged
            return
        yield row, position


def _parquet_rows(
    stream: BinaryIO, path: Path, origin: str, options: ReadOptions, meter: Meter
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The columns asked for, a row group at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecipeError(f"{origin}: reading parquet needs pyarrow; install quill's extra `parquet`") from None
    before, number = meter.done, 0
    with tempfile.TemporaryFile(buffering=0) as plain:
        if path.suffix.lower() in COMPRESSED_SUFFIXES:  # parquet is read from its end
            while chunk := stream.read(_CHUNK):
                append_scratch(plain, chunk, f"what {origin} unpacks to")
        try:
            with pyarrow.parquet.ParquetFile(io.BufferedReader(plain) if plain.tell() else path) as file:
                _require_columns(file.schema_arrow.names, options.text_keys, origin)
                columns = [key for key in options.keys if key in file.schema_arrow.names]
                start, size = meter.done, path.stat().st_size - (meter.done - before)
                for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{origin}, row {number}", row
                    meter.done = start + size * number // max(1, file.metadata.num_rows)
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: not UTF-8 text ({error.reason}); convert it first") from None
        except pyarrow.ArrowException as error:
            raise DataError(f"{origin}: not a readable parquet file ({error}); fetch it again") from None


def _require_columns(names: list[str], keys: tuple[str, ...], origin: str) -> None:
    for key in keys:
        if key not in names:
            raise DataError(f"{origin}: has no column {key!r}; name the text's with --text-key ({', '.join(names)})")


def _require_unicode(text: str, place: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{place}: holds half of a surrogate pair, which is no character; repair it") from None
    return text
