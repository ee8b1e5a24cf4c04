"""docs/several-models.md: its Python prints what it says, over a real server with the options of the page."""

from __future__ import annotations

from pathlib import Path

from server.settings import bundled_model_path
from tests.docs_pages import run_python
from tests.server.real import RealServer

PAGE = Path(__file__).parents[2] / "docs" / "several-models.md"


def test_the_page_prints_what_it_says(tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("old", "new")}
    for folder in models.values():
        folder.symlink_to(bundled_model_path(), target_is_directory=True)
    options = ["--model", str(models["new"]), "--served-model-name", "old,new", "--split", "chat=old:9,new:1"]
    server = RealServer(models["old"], *options, "--device", "cpu")
    try:
        server.wait_ready()
        page = tmp_path / PAGE.name
        page.write_text(PAGE.read_text(encoding="utf-8").replace("http://127.0.0.1:8000", server.url), encoding="utf-8")
        printed = list(run_python(page))
    finally:
        server.kill()
    assert [(each.line, each.actual) for each in printed] == [(each.line, each.stated) for each in printed]
