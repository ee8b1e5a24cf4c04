"""Folders and files that appear whole or not at all, and are on the disk when they do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from model import atomic_folder
from model.atomic_folder import clear_leftovers, remove_folder, replace_file, replace_folder
from model.errors import CheckpointError


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "marker").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Disk:
    """Knows what was flushed: a power cut loses what changed since, and names of folders that were not flushed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushed: dict[int, int] = {}
        self.flushes: list[int] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        self.flushed[status.st_ino] = status.st_mtime_ns
        self.flushes.append(status.st_ino)

    def holds(self, path: Path) -> bool:
        status = path.stat()
        return self.flushed.get(status.st_ino) == status.st_mtime_ns


@pytest.mark.parametrize("exchange", [True, False])
def test_everything_is_flushed_before_it_gets_its_name_and_the_name_after(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, put_in_place = Disk(monkeypatch), atomic_folder._put_in_place

    def checked(partial: Path, folder: Path, previous: Path) -> None:
        assert [path for path in (partial, *partial.rglob("*")) if not disk.holds(path)] == []
        disk.flushes.clear()
        put_in_place(partial, folder, previous)
        assert disk.flushes[-1] == folder.parent.stat().st_ino

    monkeypatch.setattr(atomic_folder, "_put_in_place", checked)
    if not exchange:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda first, second: False)
    target = tmp_path / "new" / "below" / "target"
    for text in ("one", "two"):
        replace_folder(target, writer(text), marker="marker")
        assert (target / "inner" / "file").read_text() == text
    for folder in (tmp_path, tmp_path / "new"):  # the names of the folders above it
        assert folder.stat().st_ino in disk.flushed
    assert names(target.parent) == ["target"]


def test_without_an_exchange_a_failing_rename_gives_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "target", Path.rename
    replace_folder(target, writer("old"), marker="marker")

    def failing(self: Path, other: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, other)

    monkeypatch.setattr(atomic_folder, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="target cannot be written: No space left on device"):
        replace_folder(target, writer("new"), marker="marker")
    assert (target / "marker").read_text() == "old"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("problem", [OSError(5, "Input/output error"), SafetensorError("I/O error: disk full")])
def test_a_refusing_disk_leaves_no_folder_behind(problem: Exception, tmp_path: Path) -> None:
    def refused(folder: Path) -> None:
        writer("half")(folder)
        raise problem

    with pytest.raises(CheckpointError, match=r"target cannot be written: I"):
        replace_folder(tmp_path / "new" / "target", refused, marker="marker")
    assert names(tmp_path) == []


def test_an_error_of_the_writer_s_own_leaves_the_old_folder(tmp_path: Path) -> None:
    def wrong(folder: Path) -> None:
        raise ValueError("a mistake")

    replace_folder(tmp_path / "target", writer("old"), marker="marker")
    with pytest.raises(ValueError, match="a mistake"):
        replace_folder(tmp_path / "target", wrong, marker="marker")
    assert (tmp_path / "target" / "marker").read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_a_folder_that_is_not_ours_and_its_neighbours_are_left_alone(tmp_path: Path) -> None:
    for name in ("target", ".target.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no marker"):
        replace_folder(tmp_path / "target", writer("new"), marker="marker")
    with pytest.raises(CheckpointError, match="Not a directory"):
        replace_folder(tmp_path / "target" / "photo" / "below", writer("new"), marker="marker")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        ".target.previous", ".target.previous/photo", "target", "target/photo",
    ]  # fmt: skip


def test_leftovers_are_cleared_and_a_folder_moved_aside_comes_back(tmp_path: Path) -> None:
    for name in ("kept", ".kept.partial", ".gone.previous", ".kept.previous", ".other", "a.partial"):
        (tmp_path / name).mkdir()
        writer(name)(tmp_path / name)
    (tmp_path / ".file.partial").write_text("half")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".other", "a.partial", "gone", "kept"]
    assert (tmp_path / "gone" / "marker").read_text() == ".gone.previous"
    assert (tmp_path / "kept" / "marker").read_text() == "kept"
    clear_leftovers(tmp_path / "absent")


def test_a_folder_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_folder(tmp_path / "target", writer("old"), marker="marker")

    def full(self: Path, other: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(CheckpointError, match="target cannot be removed: No space left on device"):
            remove_folder(tmp_path / "target")
    assert names(tmp_path) == ["target"]
    remove_folder(tmp_path / "target")
    assert names(tmp_path) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, disk = tmp_path / "file", Disk(monkeypatch)
    replace_file(path, b"old")
    assert path.read_bytes() == b"old"
    assert disk.holds(path)
    assert disk.flushes[-1] == tmp_path.stat().st_ino

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="file cannot be written: No space left on device"):
        replace_file(path, b"new")
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])
    with pytest.raises(CheckpointError, match="below cannot be written: Not a directory"):
        replace_file(path / "below", b"")
