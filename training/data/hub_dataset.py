"""Rows of a Hugging Face dataset, through the optional library `datasets`. Free of torch.

    hf:roneneldan/TinyStories      hf:wikitext:wikitext-2-raw-v1@train      hf:data/saved@train

A name on the hub, a folder of data files, or a folder that the library saved; `:CONFIG` and `@SPLIT` (default train)
choose a part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.compressed import Meter
from training.data.labels import row_labels
from training.data.readers import Piece, ReadOptions, document_pieces, row_text
from training.errors import DataError, RecipeError

_SPEC = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")
_ROWS_AT_A_TIME = 1000


@dataclass(slots=True)
class HubDataset:
    """`streaming` reads over the network without keeping a copy. After `read`, `sha256` and `num_bytes` are of the
    texts that were read, unless the digest was known before."""

    origin: str
    spec: str
    sha256: str
    streaming: bool
    num_bytes: int = 0

    def read(self, options: ReadOptions, meter: Meter) -> Iterator[Piece]:
        """One document a row, empty ones left out. Raises DataError for a dataset or field that is not there."""
        digest, self.num_bytes, number = hashlib.sha256(), 0, 0
        for batch in _open(self.origin, self.spec, self.streaming).iter(_ROWS_AT_A_TIME):
            columns = {key: values for key, values in batch.items() if key in options.keys} or batch
            for values in zip(*columns.values(), strict=True):
                number += 1
                row, place = dict(zip(columns, values, strict=True)), f"{self.origin}, row {number}"
                text, labels = row_text(row, place, options.text_keys), row_labels(row, place, options.control_keys)
                data = "".join([*(label.token for label in labels), text]).encode()
                digest.update(b"%d:" % len(data) + data)
                self.num_bytes += len(data)
                meter.done += len(data)
                yield from document_pieces(text, options.cut, labels)
        self.sha256 = self.sha256 or digest.hexdigest()


def dataset_rows(origin: str, spec: str) -> Iterator[dict[str, Any]]:
    """The rows with all their columns. Raises RecipeError or DataError for a dataset that cannot be opened."""
    yield from _open(origin, spec, streaming=True)


def is_saved_dataset(folder: Path) -> bool:
    """Whether the library's `save_to_disk` wrote this folder: one dataset, or a set of splits."""
    names = {path.name for path in folder.glob("*.json")}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def _open(origin: str, spec: str, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise RecipeError(
            f"{origin}: reading it needs the datasets library; install quill's extra `datasets`"
        ) from None
    name, config, split = _parse(origin, spec)
    try:
        if is_saved_dataset(Path(name)):
            return _part(origin, datasets.load_from_disk(name), split)
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{origin}: the dataset cannot be opened ({reason}); check its name, config and split"
        ) from None


def _parse(origin: str, spec: str) -> tuple[str, str | None, str]:
    if Path(spec).is_dir():
        return spec, None, "train"
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise RecipeError(f"{origin}: not of the form hf:OWNER/NAME[:CONFIG][@SPLIT]")
    return match["name"], match["config"], match["split"] or "train"


def _part(origin: str, saved: Any, split: str) -> Any:
    """A saved dataset, or the split of a saved set of them."""
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise DataError(f"{origin}: holds no split {split!r}, only {', '.join(saved)}; choose one with hf:FOLDER@SPLIT")
    return saved[split]
