"""Rows of a JSON-lines file, plain or compressed, decoded into a struct that names its fields. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from training.data.compressed import Meter, open_bytes
from training.errors import DataError

Row = TypeVar("Row", bound=msgspec.Struct)


def read_rows(path: Path, kind: type[Row]) -> Iterator[tuple[str, Row]]:
    """Each row with its place, "FILE, line N"; empty lines are passed over, fields that `kind` lacks too.

    Raises DataError, naming the place, for a line that is no such object, and for a file that cannot be read.
    """
    decoder = msgspec.json.Decoder(kind)
    with open_bytes(path, str(path), Meter()) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                yield place, decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise DataError(f"{place}: {error}; every line must be a JSON object of the format") from None
