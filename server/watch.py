"""What lies in a watched folder: the checkpoint that arrived last, found by the times of a few small files.

A watched folder is a training run (its checkpoints/ holds `last`, `best` and `step-N`), a folder of model folders, or a
model folder that is written anew. Quill's own writers let a folder appear whole; of a copy in progress the gate says
that it is damaged, and it is looked at again once its files change. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.errors import CheckpointError
from model.manifest import MANIFEST_FILE, Manifest, read_manifest

CHECKPOINTS, BEST = "checkpoints", "best"
Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A model folder with a manifest. `manifest` is None where that cannot be read, which `problem` explains."""

    folder: Path
    manifest: Manifest | None
    problem: str | None = None

    @property
    def name(self) -> str:
        """For clients, who are not told of paths."""
        return self.folder.name

    @property
    def weights(self) -> str | None:
        return None if self.manifest is None else self.manifest.weights


class WatchedFolder:
    """Looks at a folder each time it is asked; reads a manifest again only where the file is another than before."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, tuple[tuple[int, int, int], FoundCheckpoint]] = {}

    def newest(self) -> FoundCheckpoint | None:
        """The checkpoint whose manifest was written last, or None while there is none."""
        found: list[tuple[int, int, Path, tuple[int, int, int]]] = []
        for folder in self._folders():
            try:
                status = (folder / MANIFEST_FILE).stat()
            except OSError:
                continue  # no checkpoint, or one that is just being replaced
            identity = (status.st_mtime_ns, status.st_ino, status.st_size)
            # step-N shares its files with last: the name decides, so that both polls agree on one of them.
            found.append((status.st_mtime_ns, status.st_ino, folder, identity))
        if not found:
            return None
        _, _, folder, identity = max(found)
        known = self._read.get(folder)
        if known is None or known[0] != identity:
            self._read = {folder: (identity, _read(folder))}
        return self._read[folder][1]

    def _folders(self) -> list[Path]:
        try:
            if (self.root / MANIFEST_FILE).is_file():
                return [self.root]
            parent = self.root / CHECKPOINTS
            return [path for path in (parent if parent.is_dir() else self.root).iterdir() if _may_be_model(path)]
        except OSError:
            return []  # the folder may come, or come back


def first_checkpoint(root: Path) -> Path | None:
    """What to serve of a watched folder at the start: a run's best checkpoint, or else the newest one that is there."""
    best = root / CHECKPOINTS / BEST
    if (best / MANIFEST_FILE).is_file():
        return best
    newest = WatchedFolder(root).newest()
    return None if newest is None else newest.folder


def signature(folder: Path) -> Signature:
    """Changes whenever a file of the folder is written, replaced, added or removed."""
    try:
        files = [(path.name, path.stat()) for path in folder.iterdir() if path.is_file()]
    except OSError:
        return ()
    return tuple(sorted((name, status.st_mtime_ns, status.st_ino, status.st_size) for name, status in files))


def _may_be_model(path: Path) -> bool:
    """Not the folders that are being written or removed, whose names begin with a dot."""
    return not path.name.startswith(".") and path.is_dir()


def _read(folder: Path) -> FoundCheckpoint:
    try:
        return FoundCheckpoint(folder, read_manifest(folder))
    except CheckpointError as error:
        return FoundCheckpoint(folder, None, str(error))
