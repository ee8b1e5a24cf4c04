"""What a process knows of the others before they are in touch. Free of torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, MutableMapping

from model.errors import QuillError

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """To be called before torch loads libgomp, which then reads it: how long idle OpenMP workers spin.

    By its default they outlast a time slice, and on cores that other processes use too, a step waits for a worker that
    cannot run because another spins in its place: a hundred times slower. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> None:
    """For a step on the CPU: freed tensors stay with the process, and the next step finds them there.

    By default glibc gives large blocks back to the system and gets them again zeroed, page by page: a sixth of a step.
    Where the C library has no mallopt, nothing is done.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Around what fails alike on every rank that torchrun starts: one on each machine tells, the others exit with 1."""
    try:
        yield
    except QuillError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(1) from None
        raise
