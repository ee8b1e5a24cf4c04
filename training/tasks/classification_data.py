"""Labelled texts out of TSV, CSV and JSON lines (each also .gz or .zst), and their split. Free of torch.

A TSV's fields are taken as they are, without quotes and escapes, as the SMS spam collection has them; a CSV's may be
quoted. A table without a header line has two columns, the label and then the text.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from training.data.compressed import SUFFIXES as COMPRESSED_SUFFIXES
from training.data.compressed import Meter, open_bytes
from training.errors import DataError, RecipeError

TEXT, LABEL = "text", "label"
_MAX_FIELD = 1 << 24  # characters; csv's own limit is smaller than some documents
Row = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns or fields; None is `text` and `label`, or, for tables of two columns, label and text."""

    text: str | None = None
    label: str | None = None

    @property
    def are_named(self) -> bool:
        return self.text is not None or self.label is not None


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    texts: list[str]
    labels: list[str]


def read_labelled(path: Path, columns: Columns) -> LabelledTexts:
    """Every row's text and label. Raises DataError, naming the file and line, for what cannot be used."""
    texts, labels = read_texts(path, columns)
    if labels is None:
        raise DataError(f"{path}: has no labels; name their column with --label-column")
    return LabelledTexts(texts, labels)


def read_texts(path: Path, columns: Columns) -> tuple[list[str], list[str] | None]:
    """(texts, labels), labels None where the file has none: plain text has a text on each line.

    Raises DataError, naming the file and line.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    reader = _READERS.get(suffixes[-1] if suffixes else "")
    if reader is None:
        raise DataError(f"{path}: texts are read from {', '.join(_READERS)} (also .gz, .zst); convert it to one")
    with open_bytes(path, str(path), Meter()) as stream:
        try:
            rows = list(reader(stream, str(path), columns))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.object[error.start]:#x}); convert it first") from None
    if not rows:
        raise DataError(f"{path}: holds no text")
    labels = [label for _, label in rows if label is not None]
    if labels and len(labels) < len(rows):
        raise DataError(f"{path}: {len(rows) - len(labels)} of {len(rows)} rows have no label; label or remove them")
    return [text for text, _ in rows], labels or None


def _read_tsv(stream: BinaryIO, origin: str, columns: Columns) -> Iterator[Row]:
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as file:
        rows = (line.rstrip("\r\n").split("\t") for line in file)
        yield from _table_rows(enumerate(rows, start=1), origin, columns)


def _read_csv(stream: BinaryIO, origin: str, columns: Columns) -> Iterator[Row]:
    before = csv.field_size_limit(_MAX_FIELD)
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                yield from _table_rows(((reader.line_num, row) for row in reader), origin, columns)
            except csv.Error as error:
                raise DataError(f"{origin}, line {reader.line_num}: not a row of a CSV ({error}); repair it") from None
    finally:
        csv.field_size_limit(before)


def _table_rows(rows: Iterable[tuple[int, list[str]]], origin: str, columns: Columns) -> Iterator[Row]:
    places: tuple[int, int | None] | None = None
    width = 0
    for number, row in rows:
        if not any(row):
            continue
        if places is None:
            width = len(row)
            places, is_header = _find_columns(row, f"{origin}, line {number}", columns)
            if is_header:
                continue
        if len(row) != width:
            raise DataError(f"{origin}, line {number}: has {len(row)} columns where the first has {width}; repair it")
        text, label = places
        if label is not None and not row[label]:
            raise DataError(f"{origin}, line {number}: has no label; label the row or remove it")
        yield row[text], None if label is None else row[label]


def _find_columns(first: list[str], place: str, columns: Columns) -> tuple[tuple[int, int | None], bool]:
    """((text's column, label's), whether the first row is a header)."""
    names = [name.strip() for name in first]
    if not columns.are_named and not (TEXT in names and LABEL in names):
        if len(first) == 2:
            return (1, 0), False
        raise DataError(
            f"{place}: has the columns {', '.join(names)[:200]}; name two of them with --text-column and --label-column"
        )
    for option, name in (("--text-column", columns.text or TEXT), ("--label-column", columns.label)):
        if name is not None and name not in names:
            raise DataError(f"{place}: has no column {name!r} ({', '.join(names)[:200]}); name one with {option}")
    label = columns.label or (LABEL if LABEL in names else None)
    return (names.index(columns.text or TEXT), None if label is None else names.index(label)), True


def _read_jsonl(stream: BinaryIO, origin: str, columns: Columns) -> Iterator[Row]:
    text_key, label_key = columns.text or TEXT, columns.label or LABEL
    decoder = msgspec.json.Decoder(dict[str, object])
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"{origin}, line {number}"
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{place}: not a JSON object ({error}); every line must be one") from None
        text = row.get(text_key)
        if not isinstance(text, str):
            raise DataError(f"{place}: has no text in {text_key!r}; name its field with --text-column")
        yield text, _label_of(row.get(label_key), place, label_key)


def _label_of(value: object, place: str, key: str) -> str | None:
    """Labels may be words, whole numbers or truth values."""
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{place}: {key!r} must be a label: a word or a whole number")
    return str(value)


def _read_lines(stream: BinaryIO, origin: str, columns: Columns) -> Iterator[Row]:
    if columns.are_named:
        raise DataError(f"{origin}: plain text has no columns; leave --text-column and --label-column out")
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield line.rstrip("\n"), None


_READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".txt": _read_lines}


@dataclass(frozen=True, slots=True)
class Split:
    """Row numbers of the three parts, in order."""

    train: list[int]
    val: list[int]
    test: list[int]


def split_rows(data: LabelledTexts, *, val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Every label's share of each part is its share of the whole, up to rounding; the seed decides which rows.

    Rows of the same text go to the same part: what a model has read says nothing about what it has not. A part whose
    fraction is above 0 gets a text of every label.
    Raises RecipeError for fractions that leave nothing, DataError for a label with too few different texts.
    """
    for option, fraction in (("--val-fraction", val_fraction), ("--test-fraction", test_fraction)):
        if not 0.0 <= fraction < 1.0:
            raise RecipeError(f"{option} is {fraction} but must lie in [0, 1)")
    if val_fraction + test_fraction >= 1.0:
        raise RecipeError("--val-fraction and --test-fraction leave no text to train on; their sum must be below 1")
    generator = np.random.default_rng(seed)
    part_of: dict[str, str] = {}
    for label, texts in sorted(_different_texts(data).items()):
        counts = {"test": _share(len(texts), test_fraction), "val": _share(len(texts), val_fraction)}
        if sum(counts.values()) >= len(texts):
            raise DataError(
                f"label {label!r} has {len(texts)} different texts, too few for the parts asked for; add some, remove "
                "the label, or, if it stands in a header line, name the columns with --text-column and --label-column"
            )
        parts = [name for name, count in counts.items() for _ in range(count)]
        order = generator.permutation(len(texts))
        part_of |= {texts[index]: part for index, part in zip(order, parts, strict=False)}
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number, text in enumerate(data.texts):
        rows[part_of.get(text, "train")].append(number)
    return Split(rows["train"], rows["val"], rows["test"])


def _different_texts(data: LabelledTexts) -> dict[str, list[str]]:
    """{label: its texts}; a text with several labels counts under its first."""
    first: dict[str, str] = {}
    for text, label in zip(data.texts, data.labels, strict=True):
        first.setdefault(text, label)
    result: dict[str, list[str]] = {label: [] for label in data.labels}
    for text, label in first.items():
        result[label].append(text)
    return result


def _share(count: int, fraction: float) -> int:
    return max(1, round(count * fraction)) if fraction else 0


def count_labels(labels: Sequence[str], rows: Iterable[int]) -> Counter[str]:
    return Counter(labels[row] for row in rows)
