"""`--help`: every option by its subject, with what it takes, in the width at hand."""

from __future__ import annotations

import re

import pytest

from server.batch_settings import BatchSettings
from server.cli import main
from server.help import GROUPS, OTHERS, grouped, help_text
from server.settings import EngineSettings, Settings

KINDS = pytest.mark.parametrize("kind", [Settings, BatchSettings])


def flags(text: str) -> list[str]:
    return re.findall(r"^  --(?:\[no-\])?([\w-]+)", text, re.MULTILINE)


@KINDS
@pytest.mark.parametrize("columns", [60, 100, 400])
def test_every_option_is_there_once_and_fits(kind: type[EngineSettings], columns: int) -> None:
    text = help_text(kind, columns)
    assert sorted(flags(text)) == sorted(name.replace("_", "-") for name in kind.model_fields)
    assert max(map(len, text.splitlines())) <= min(columns, 120)
    words = " ".join(text.split())
    for info in kind.model_fields.values():
        assert info.description
        assert " ".join(info.description.split()) in words


@KINDS
def test_every_option_has_a_subject(kind: type[EngineSettings]) -> None:
    assert OTHERS not in grouped(kind), "GROUPS of server/help.py names each setting"
    groups = [name for names in GROUPS.values() for name in names]
    assert len(groups) == len(set(groups))
    assert set(groups) <= {*Settings.model_fields, *BatchSettings.model_fields}


def test_what_an_option_takes_and_its_default() -> None:
    text = " ".join(help_text(Settings, 100).split())
    for expected in (
        "--device {auto,cpu,cuda} where the model runs (default: auto)",
        "--port N port to listen on; 0 picks a free one (default: 8000)",
        "--max-body-size SIZE largest request body (default: 1MiB)",
        "--[no-]prefix-caching reuse",
        "--deterministic refuse",
        "--drain-delay SECONDS least seconds between SIGTERM and the end of listening (default: 0)",
        "--kv-cache-memory SIZE memory for the KV cache, such as 2GiB --block-size",
    ):
        assert expected in text
    assert "--input FILE request lines" in " ".join(help_text(BatchSettings, 100).split())


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--port", "1", "--help"], ["batch", "--help"]])
def test_the_command_line_answers(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    kind = BatchSettings if argv[0] == "batch" else Settings
    assert capsys.readouterr().out == help_text(kind) + "\n"
