"""Which checkpoint of a watched folder is the newest, while folders come, go and are written anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from server.watch import WatchedFolder, first_checkpoint, signature


def checkpoint(folder: Path, weights: str, time: int) -> Path:
    """The manifest is all that is looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"version": 1, "weights": weights, "created": "2026-01-01T00:00:00+00:00", "files": {}}
    (folder / "manifest.json").write_text(json.dumps(content))
    os.utime(folder / "manifest.json", (time, time))
    return folder


def newest(root: Path) -> str | None:
    found = WatchedFolder(root).newest()
    return None if found is None else f"{found.name}:{found.weights}"


def test_a_runs_checkpoints(tmp_path: Path) -> None:
    watched = WatchedFolder(tmp_path)
    assert watched.newest() is None
    (tmp_path / "checkpoints").mkdir()
    assert watched.newest() is None
    assert first_checkpoint(tmp_path) is None
    last = checkpoint(tmp_path / "checkpoints" / "last", "sha256:1", 100)
    assert first_checkpoint(tmp_path) == last
    best = checkpoint(tmp_path / "checkpoints" / "best", "sha256:0", 90)
    assert first_checkpoint(tmp_path) == best
    found = watched.newest()
    assert found is not None
    assert (found.folder, found.weights) == (last, "sha256:1")
    checkpoint(best, "sha256:2", 110)
    assert newest(tmp_path) == "best:sha256:2"
    again = watched.newest()
    assert again is not None
    assert again.weights == "sha256:2"
    (tmp_path / "state" / "step-5").mkdir(parents=True)
    checkpoint(tmp_path / "checkpoints" / ".last.partial", "sha256:9", 500)  # being written
    assert newest(tmp_path) == "best:sha256:2"


def test_a_folder_of_models_and_a_model_that_is_written_anew(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a", "sha256:1", 100)
    checkpoint(tmp_path / "b", "sha256:2", 200)
    (tmp_path / "notes.txt").write_text("no model")
    assert newest(tmp_path) == "b:sha256:2"
    shutil.rmtree(tmp_path / "b")
    assert newest(tmp_path) == "a:sha256:1"
    watched = WatchedFolder(tmp_path / "a")
    assert watched.newest() is not None
    checkpoint(tmp_path / "a", "sha256:3", 300)
    assert newest(tmp_path / "a") == "a:sha256:3"
    found = watched.newest()
    assert found is not None
    assert found.weights == "sha256:3"
    shutil.rmtree(tmp_path)
    assert watched.newest() is None


def test_an_unreadable_manifest_is_a_checkpoint_with_a_problem(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", "sha256:1", 100)
    (folder / "manifest.json").write_text('{"version": 1,')
    found = WatchedFolder(tmp_path).newest()
    assert found is not None
    assert found.manifest is None
    assert found.weights is None
    assert found.problem is not None
    assert "manifest.json" in found.problem


def test_links_of_one_checkpoint_are_the_same_at_every_look(tmp_path: Path) -> None:
    last = checkpoint(tmp_path / "checkpoints" / "last", "sha256:1", 100)
    step = tmp_path / "checkpoints" / "step-5"
    step.mkdir()
    os.link(last / "manifest.json", step / "manifest.json")
    assert {newest(tmp_path) for _ in range(5)} == {"step-5:sha256:1"}


@pytest.mark.parametrize("change", ["write", "add", "remove", "replace"])
def test_a_signature_follows_every_file(tmp_path: Path, change: str) -> None:
    folder = checkpoint(tmp_path / "a", "sha256:1", 100)
    (folder / "model.safetensors").write_bytes(b"half")
    before = signature(folder)
    assert signature(folder) == before
    match change:
        case "write":
            (folder / "model.safetensors").write_bytes(b"whole file")
        case "add":
            (folder / "config.json").write_text("{}")
        case "remove":
            (folder / "model.safetensors").unlink()
        case "replace":
            (tmp_path / "new").write_bytes(b"half")
            (tmp_path / "new").replace(folder / "model.safetensors")
    assert signature(folder) != before
    assert signature(tmp_path / "nowhere") == ()
