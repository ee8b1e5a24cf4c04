"""Temporary files, whose folder may have less room than what is written to them. Free of torch."""

from __future__ import annotations

import tempfile
from io import FileIO

from model.file_errors import write_all
from training.errors import DataError


def append_scratch(file: FileIO, data: bytes, what: str) -> None:
    """Adds to an unbuffered temporary file. Raises DataError, naming the folder, when there is no room for `what`."""
    try:
        write_all(file, data)
    except OSError as error:
        folder, reason = tempfile.gettempdir(), error.strerror or error
        raise DataError(f"{folder}: cannot hold {what} ({reason}); let TMPDIR name a larger disk") from None
