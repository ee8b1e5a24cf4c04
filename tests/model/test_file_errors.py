"""Refusals of the system, met through /dev/full and closed descriptors, name the file that was meant."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
from safetensors import SafetensorError

from model.errors import CheckpointError, ConfigError
from model.file_errors import naming_file, write_all

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@needs_full
def test_a_descriptor_s_error_gets_the_name() -> None:
    with FULL.open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left") as nameless:
            file.write(b"ink")
        assert nameless.value.filename is None
        with pytest.raises(ConfigError, match=r"^ink\.txt cannot be written: No space left on device$"):  # noqa: SIM117
            with naming_file(Path("ink.txt"), "written", ConfigError):
                file.write(b"ink")


def test_an_error_without_a_reason_of_its_own_gives_its_text() -> None:
    for problem in (SafetensorError("I/O error: disk full"), io.UnsupportedOperation("not writable")):
        with pytest.raises(CheckpointError, match=f"^a cannot be read: {problem}$"), naming_file("a", "read"):
            raise problem


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), naming_file("a", "read"):
        raise ZeroDivisionError


def test_all_is_written_where_a_write_takes_a_part(tmp_path: Path) -> None:
    class Slow(io.FileIO):
        def write(self, data: object) -> int:
            return super().write(memoryview(data)[:3])  # type: ignore[arg-type]

    with Slow(tmp_path / "file", "w") as file:
        write_all(file, b"remembers")
        write_all(file, b"")
    assert (tmp_path / "file").read_bytes() == b"remembers"


@needs_full
def test_a_full_disk_ends_the_writing() -> None:
    with FULL.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left") as refusal:
        write_all(file, b"ink")
    assert refusal.value.errno == errno.ENOSPC
