"""docs/offline.md is a program: its Python runs, its batch too, and both give what the page says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import bundled_model_path
from tests.docs_pages import run_python

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "offline.md"


def run_batches(text: str) -> None:
    for line in text.splitlines():
        if line.startswith("python -m server batch "):
            words = [*line.split()[1:], "--num-threads", "1"]
            subprocess.run([sys.executable, *words], timeout=120, check=True, capture_output=True)


def test_the_page_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/folder").symlink_to(bundled_model_path(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    printed = list(run_python(PAGE, run_batches))
    assert len(printed) == 6
    for block in printed:
        assert (block.stated or "") == block.actual, f"the block at line {block.line}"
    assert (tmp_path / "results.jsonl").is_file()
