"""docs/explain.md and docs/overload.md are programs: their Python runs and prints what they say."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from server.settings import bundled_model_path
from tests.docs_pages import fenced_blocks, run_python
from tests.server.real import running

DOCS = Path(__file__).parents[2] / "docs"


def test_explanations_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "explain.md"
    [command] = [block.text for block in fenced_blocks(page.read_text()) if block.language == "sh"]
    options = command.split()[3:]
    with running(bundled_model_path(), *options, "--num-threads", "1") as server:
        server.wait_ready()
        real, clients = httpx.Client, []

        def client(base_url: str) -> httpx.Client:
            assert base_url == "http://127.0.0.1:8000", "the default port"
            clients.append(real(base_url=server.url, timeout=60))
            return clients[-1]

        monkeypatch.setattr(httpx, "Client", client)
        printed = list(run_python(page))
        for each in clients:
            each.close()
    assert len(printed) == 4
    for block in printed:
        assert (block.stated or "") == block.actual, f"the block at line {block.line}"


def test_overload() -> None:
    printed = list(run_python(DOCS / "overload.md"))
    assert [block.stated for block in printed] == [block.actual for block in printed]
    assert len(printed) == 1
