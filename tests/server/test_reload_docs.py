"""docs/reload.md: its Python prints what it says, and its tables have what the code knows."""

from __future__ import annotations

from pathlib import Path

from model.self_check import tolerance
from server.reload_gate import SWAPPED, VERDICTS
from server.reloads import Reloads
from server.settings import Settings
from tests.docs_pages import run_python

PAGE = Path(__file__).parents[2] / "docs" / "reload.md"


def test_the_page_prints_what_it_says() -> None:
    printed = list(run_python(PAGE))
    assert len(printed) == 1
    assert all(block.actual == block.stated for block in printed)


def test_the_page_has_every_verdict_option_and_field() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for verdict in VERDICTS:
        assert (f"| `{verdict}` |" in text) == (verdict != SWAPPED), verdict
    for name in Settings.model_fields:
        if name.startswith("watch"):
            assert f"--{name.replace('_', '-')}" in text
    for name in Reloads("m", "w").values():
        assert f'"{name}": ' in text
    default = Settings.model_fields["watch_tolerance"].default
    assert f"({default} nats per token)" in text
    shares = [f"{100 * tolerance(*kind):g} %" for kind in [("float32",), ("bfloat16",), ("bfloat16", "int8")]]
    assert all(share in text for share in shares), shares
