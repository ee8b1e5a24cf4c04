"""What a process knows of the others before they are in touch. Free of torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from model.errors import QuillError


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Around what fails alike on every rank that torchrun starts: one on each machine tells, the others exit with 1."""
    try:
        yield
    except QuillError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(1) from None
        raise
