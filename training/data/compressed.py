"""Byte streams of plain, gzip and zstandard files, metered as the file itself is read. Free of torch."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from training.errors import DataError

SUFFIXES = (".gz", ".zst", ".zstd")
# A zstandard block of a few bytes may stand for 128 KiB, so little is decompressed at a time.
_ZSTD_CHUNK = 1 << 14


@dataclass(slots=True)
class Meter:
    """How much has been read so far: bytes of files as they lie on the disk."""

    done: int = 0


class MeteredFile(io.FileIO):
    """A file that tells a meter how many bytes of it were read."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path)
        self._meter = meter

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._meter.done += count or 0
        return cast(int, count)


class ZstdFile(io.RawIOBase):
    """Decompresses zstandard frames, one behind the other; EOFError if the file ends within one.

    zstandard's own reader takes a file that was cut off for a whole one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            data = self._file.read(_ZSTD_CHUNK)
            if not data:
                if self._begun:
                    raise EOFError("the file ends within a zstandard frame")
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(view), len(self._ready))
        view[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        parts = []
        while data:
            parts.append(self._frame.decompress(data))
            self._begun, data = not self._frame.eof, self._frame.unused_data
            if not self._begun:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(parts)


@contextmanager
def open_bytes(path: Path, origin: str, meter: Meter) -> Iterator[BinaryIO]:
    """The content of a file, decompressed by the end of its name.

    Raises DataError, naming `origin`, when reading inside the block finds the file damaged or unreadable.
    """
    try:
        with io.BufferedReader(MeteredFile(path, meter), 1 << 17) as file:
            yield _decompressed(cast(BinaryIO, file), path.suffix.lower())
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{origin}: damaged or no {path.suffix} file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{origin}: cannot be read ({error.strerror or error})") from None


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
    if suffix in SUFFIXES:
        return io.BufferedReader(ZstdFile(file), 1 << 17)
    return file
