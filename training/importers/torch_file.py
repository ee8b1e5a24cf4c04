"""Reading what `torch.save` wrote: the only place in the project that opens such a file, for `import` alone.

The file is checked as an archive first and then read by torch's restricted reader (`weights_only=True`), which builds
tensors and plain values and calls nothing else. What that reader refuses is refused here too: there is no other way
in. (The reader's known flaws, CVE-2025-32434 and CVE-2026-24747, are mended in every torch that this project accepts.)
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

import torch

from model.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"  # files written before torch 1.6, or since by request
_REFUSED_NAME = re.compile(r"GLOBAL (\S+) was not an allowed global")


def read_torch_file(path: Path) -> object:
    """The object in the file, its tensors on the CPU and mapped from the file where the file allows it.

    Raises CheckpointError for a file that is absent, no torch file, damaged, or that holds more than tensors and plain
    values.
    """
    mapped = _check_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on unusual files; what is wrong is raised
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except MemoryError:
        raise
    except Exception as problem:  # a damaged or hostile file can fail anywhere in the reader
        raise CheckpointError(_explain(path, problem)) from None


def _check_archive(path: Path) -> bool:
    """Whether the file is one of torch's zip archives, whole; False for the older kind. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP_MAGIC))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the checkpoint's path") from None
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None
    if start[:1] == _PICKLE_MAGIC:
        return False
    if start != _ZIP_MAGIC:
        raise CheckpointError(f"{path} is not a file that torch.save wrote; give the checkpoint itself")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
    except CheckpointError:
        raise
    except Exception:  # zipfile's own errors, and those of the decoders it uses
        raise CheckpointError(f"{path} is truncated or damaged; copy it again") from None
    return True


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    names = [info.filename.partition("/")[2] for info in archive.infolist()]
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program; give a checkpoint that holds its weights")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive but not one of torch's; give the checkpoint itself")
    # Mapped tensors are read at their place in the file, which a compressed member does not have.
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise CheckpointError(f"{path} was compressed after torch.save wrote it; unpack and save it again")
    damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} differs from its checksum; copy it again")


def _explain(path: Path, problem: Exception) -> str:
    """torch's advice, several lines that recommend the unrestricted reader, in one sentence that does not."""
    if type(problem).__name__ != "UnpicklingError":
        return f"{path} is damaged ({str(problem).splitlines()[0] if str(problem) else 'it ends early'}); copy it again"
    found = _REFUSED_NAME.search(str(problem))
    what = f" ({found[1]})" if found else ""
    return (
        f"{path} holds Python objects beside tensors and plain values{what}, which are never loaded; "
        "save a file of the weights and plain settings alone, where it was made"
    )
