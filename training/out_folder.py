"""Where `import` and `export` write: a folder that holds nothing yet, filled whole or not at all."""

from __future__ import annotations

from pathlib import Path

from model.errors import CheckpointError


def require_free(folder: Path) -> None:
    """Raise CheckpointError unless the folder is new or empty: what others made is never replaced."""
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; choose an empty or new folder for --out")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another name for --out")
