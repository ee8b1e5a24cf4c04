"""Sentences about files that the system refuses to write, read or remove. Free of torch.

An OSError of an open descriptor (a write, a flush, an fsync on a full disk) names no file; whoever opened it knows
the name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError

from model.errors import CheckpointError, QuillError


@contextmanager
def naming_file(path: Path | str, action: str, error: type[QuillError] = CheckpointError) -> Iterator[None]:
    """An OSError inside the block becomes `error`: "PATH cannot be ACTION: reason"."""
    try:
        yield
    except (OSError, SafetensorError) as problem:  # safetensors tells of a full disk by an error of its own
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be {action}: {reason}") from problem


def write_all(file: FileIO, data: bytes) -> None:
    """All of the data to an unbuffered file: a disk that becomes full takes a part and refuses the rest."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
