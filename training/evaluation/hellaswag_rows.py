"""HellaSwag's rows: JSON lines of one's own or of the hub. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from training.data.hub_dataset import dataset_rows
from training.data.sources import HUB_PREFIX
from training.errors import DataError
from training.evaluation.json_rows import read_rows


class _Row(msgspec.Struct):
    ctx: str
    endings: list[str]
    label: int | str = ""  # the hub's copy writes it as text, and leaves it empty in the test split


@dataclass(frozen=True, slots=True)
class Item:
    """A context, its possible endings and the number of the right one."""

    context: str
    endings: Sequence[str]
    label: int


def read_items(source: str, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a JSON-lines file (also .gz or .zst) or of `hf:OWNER/NAME@SPLIT`.

    Raises DataError, naming the row, for one without text or label, and for a source that holds none.
    """
    rows = _hub_rows(source) if source.startswith(HUB_PREFIX) else read_rows(Path(source), _Row)
    items = [_item(place, row) for place, row in islice(rows, limit)]
    if not items:
        raise DataError(f"{source}: holds no row; name HellaSwag's JSON lines")
    return items


def _item(place: str, row: _Row) -> Item:
    if not row.ctx.strip() or len(row.endings) < 2 or not all(row.endings):
        raise DataError(f"{place}: needs a context in `ctx` and two or more `endings`; mend or remove it")
    label = str(row.label).strip()
    if not label:
        raise DataError(f"{place}: has no label; take the validation split, whose answers are known")
    if not label.isdecimal() or int(label) >= len(row.endings):
        raise DataError(f"{place}: the label is {label!r} but must number one of {len(row.endings)} endings from 0 on")
    return Item(row.ctx, row.endings, int(label))


def _hub_rows(source: str) -> Iterator[tuple[str, _Row]]:
    for number, row in enumerate(dataset_rows(source, source.removeprefix(HUB_PREFIX)), start=1):
        place = f"{source}, row {number}"
        try:
            yield place, msgspec.convert(row, _Row)
        except msgspec.ValidationError as error:
            raise DataError(f"{place}: {error}; name a dataset with HellaSwag's columns") from None
