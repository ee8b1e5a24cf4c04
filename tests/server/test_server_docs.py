"""The pages about the server are programs: their Python prints what they say, and their curl lines are answered, by a
real server on the bundled checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import Settings, bundled_model_path, load_settings
from tests.docs_pages import fenced_blocks, run_python
from tests.server.real import RealServer

ROOT = Path(__file__).parents[2]
PAGES = ("quickstart.md", "api.md", "migrating-from-vllm.md")
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    server = RealServer(bundled_model_path(), "--num-threads", "1", "--device", "cpu")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_what_it_says(name: str, server: RealServer, tmp_path: Path) -> None:
    page = tmp_path / name
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    page.write_text(text.replace(ADDRESS, server.url), encoding="utf-8")
    results = list(run_python(page))
    assert results
    assert [(each.line, each.actual) for each in results] == [(each.line, each.stated or "") for each in results]


def curl_commands(text: str) -> Iterator[str]:
    """Those of the shell blocks, with the lines that a backslash joins."""
    for block in fenced_blocks(text):
        if block.language == "sh":
            lines = block.text.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if line.startswith("curl "))


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_curl_lines_are_answered(name: str, server: RealServer, tmp_path: Path) -> None:
    (tmp_path / ".curlrc").write_text("fail\nsilent\nshow-error\nmax-time = 30\n")
    commands = list(curl_commands((ROOT / name).read_text(encoding="utf-8")))
    assert commands or name == "docs/api.md"
    for command in commands:
        shell = subprocess.run(
            ["bash", "-c", command.replace(ADDRESS, server.url)],
            env={**os.environ, "CURL_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert shell.returncode == 0, (command, shell.stderr)
        assert shell.stdout


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/folder").symlink_to(bundled_model_path(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    [printed] = run_python(ROOT / "README.md")
    assert printed.actual


@pytest.mark.parametrize("name", ["README.md", *sorted(path.name for path in (ROOT / "docs").glob("*.md"))])
def test_server_commands_are_accepted_wherever_they_stand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those behind variables, and what containers get."""
    monkeypatch.setattr("server.settings._check_model_folder", lambda folder: None)  # the reader's, not here
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    text = "\n".join(block.text for block in fenced_blocks(page.read_text("utf-8")) if block.language == "sh")
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "server" in words and words[words.index("server") - 1] == "-m" and "batch" not in words:
            load_settings(words[words.index("server") + 1 :])
        elif words[:2] == ["docker", "run"] and "quill" in words:
            load_settings(words[words.index("quill") + 1 :])


def test_settings_that_pages_name_exist() -> None:
    known = {name.replace("_", "-") for name in Settings.model_fields}
    for name in ("deploying.md", "metrics.md", "quickstart.md", "how-it-works.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        named = {flag.removeprefix("no-") for flag in re.findall(r"`--([a-z][a-z-]+)", prose)}
        assert named <= known, name
