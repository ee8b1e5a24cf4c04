"""Writing a folder or a file whole or not at all. Free of torch.

The new content is written beside the target, flushed to disk and exchanged with the target in one step where the
system can (Linux: renameat2), so that a reader, or a process that starts after a crash, finds the old folder or the
new one and never a mixture. Elsewhere the target is renamed away first; between the two renames it is missing, and
`clear_leftovers` or the next `replace_folder` puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from model.errors import CheckpointError
from model.file_errors import naming_file

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PARTIAL, _PREVIOUS = ".partial", ".previous"


def replace_folder(folder: Path, write: Callable[[Path], None], *, marker: str) -> None:
    """Create `folder` with what `write(temporary folder)` puts there, replacing an older one.

    An existing folder is replaced only if it is empty or holds the file `marker`. One writer per folder: what an
    interrupted one left is removed. Raises CheckpointError if the folder may not be replaced or the disk refuses;
    whatever `write` raises, an older folder stays as it was and nothing is left beside it.
    """
    folder = folder.resolve()  # of a link, replace what it points to
    partial, previous = _beside(folder, _PARTIAL), _beside(folder, _PREVIOUS)
    made: list[Path] = []
    try:
        with naming_file(folder, "written"):
            _check_replaceable(folder, marker)
            _settle(folder, previous)
            _make_parents(folder.parent, made)
            _remove(partial)
            partial.mkdir()
            write(partial)
            _sync_tree(partial)
            _put_in_place(partial, folder, previous)
            made.clear()
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange this is the old folder
        _remove_empty(made)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its name, flush it to disk and rename it. One writer per file.

    Raises CheckpointError when the disk refuses; an older file then stays as it was.
    """
    partial = _beside(path, _PARTIAL)
    with naming_file(path, "written"):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def remove_folder(folder: Path) -> None:
    """Delete a folder that appears whole or not at all; what a killed deletion leaves, `clear_leftovers` removes.

    Raises CheckpointError when the disk refuses.
    """
    partial = _beside(folder, _PARTIAL)
    with naming_file(folder, "removed"):
        _remove(partial)
        folder.rename(partial)
        shutil.rmtree(partial)


def clear_leftovers(parent: Path) -> None:
    """Undo in `parent` what killed writers left: what is half written goes, a folder moved aside comes back.

    For the only writer of `parent`, before it writes. Raises CheckpointError when the disk refuses.
    """
    with naming_file(parent, "cleared"):
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            if path.name.startswith(".") and path.name.endswith(_PREVIOUS):
                _settle(parent / path.name[1 : -len(_PREVIOUS)], path)
            elif path.name.startswith(".") and path.name.endswith(_PARTIAL):
                _remove(path)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}{kind}")


def _settle(folder: Path, previous: Path) -> None:
    """Where the last writer ended between two renames, give the folder back; where after them, drop the old one."""
    if previous.exists():
        if folder.exists():
            _remove(previous)
        else:
            previous.rename(folder)
            _sync(folder.parent)


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
        try:
            partial.rename(folder)
        except OSError:
            previous.rename(folder)
            raise
        _sync(folder.parent)
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


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Create a folder and those above it, flushed to disk; `made` gets the new ones, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)
        _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        # Some network and FUSE file systems have no fsync of a folder; of a file every one has.
        if problem.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        try:
            path.rmdir()
        except OSError:
            return  # another writer has put something there
