"""Writing a folder whole or not at all. Free of torch.

The new content is written beside the target, flushed to disk and exchanged with the target in one step where the
system can (Linux: renameat2), so that a reader, or a process that starts after a crash, finds the old folder or the
new one and never a mixture.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from model.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_folder(folder: Path, write: Callable[[Path], None], *, marker: str) -> None:
    """Create `folder` with what `write(temporary folder)` puts there, replacing an older one.

    An existing folder is replaced only if it is empty or holds the file `marker`. One writer per folder: what an
    interrupted one left is removed. Raises CheckpointError if the folder may not be replaced or the disk refuses.
    """
    folder = folder.resolve()  # of a link, replace what it points to
    _check_replaceable(folder, marker)
    partial, previous = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "previous"))
    try:
        if previous.exists() and not folder.exists():
            previous.rename(folder)  # the last writer ended between two renames
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        _remove(previous)
        partial.mkdir()
        write(partial)
        _sync_tree(partial)
        _put_in_place(partial, folder, previous)
    except OSError as problem:
        raise CheckpointError(f"{folder} cannot be written: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange this is the old folder


def _check_replaceable(folder: Path, marker: str) -> None:
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / marker).is_file():
            raise CheckpointError(f"{folder} exists and holds no {marker}; choose an empty or new folder")
    elif folder.exists():
        raise CheckpointError(f"{folder} is a file; choose another name for the folder")


def _put_in_place(partial: Path, folder: Path, previous: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
    elif not _exchange(partial, folder):
        folder.rename(previous)
        partial.rename(folder)
        _remove(previous)
    _sync(folder.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(result == 0)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
