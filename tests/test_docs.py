"""The pages of docs/learn are programs: each runs, prints what it says, and shows commands that exist."""

from __future__ import annotations

import itertools
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from server.batch_settings import BatchSettings
from server.settings import load_settings, parse_settings
from tests.docs_pages import Block, fenced_blocks, run_python
from tests.training.shell import shell_commands, training_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "learn").glob("*.md"))
DOCUMENTS = sorted(DOCS.rglob("*.md"))
MAX_COLUMNS = 120

# A node or an edge of the part of Mermaid's flowcharts that the pages use; a label with a special character is quoted.
_NODE = r'\w+(?:\["[^"\]]+"\]|\(\("[^"]+"\)\))?'
_STATEMENT = re.compile(rf'    {_NODE}(?: -->(?:\|"[^"|]+"\|)? {_NODE})+')

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(DOCS).as_posix())


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks_of(path: Path, language: str) -> list[Block]:
    return [block for block in fenced_blocks(read(path)) if block.language == language]


@by_name
def test_a_page_prints_what_it_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)
    results = list(run_python(page))
    assert results
    for printed in results:
        assert (printed.stated or "") == printed.actual, f"{page.name}, the block at line {printed.line}"


@by_name
def test_every_output_on_a_page_follows_its_program(page: Path) -> None:
    orphans = [
        block.line
        for block in blocks_of(page, "text")
        if block.directly_after is None or block.directly_after.language != "python"
    ]
    assert orphans == []


@documents
def test_blocks_are_of_known_languages(document: Path) -> None:
    assert {block.language for block in fenced_blocks(read(document))} <= {"python", "text", "sh", "mermaid"}


@documents
def test_commands_are_accepted(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.settings._check_model_folder", lambda folder: None)  # the reader's, not here
    text = "\n".join(block.text for block in blocks_of(document, "sh"))
    for words in shell_commands(text):
        training_command(words)
    for line in text.splitlines():
        if line.startswith("python -m server batch "):
            parse_settings(BatchSettings, line.split()[4:])
        elif line.startswith("python -m server "):
            load_settings(line.split()[3:])


@documents
def test_flowcharts_are_written_in_the_plain_part_of_mermaid(document: Path) -> None:
    for block in blocks_of(document, "mermaid"):
        first, *statements = block.text.rstrip().splitlines()
        assert first in ("flowchart LR", "flowchart TD"), block.line
        assert [line for line in statements if not _STATEMENT.fullmatch(line)] == [], block.line


@documents
def test_links_and_anchors_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = document if not path else document.parent / path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(read(linked)), target


def anchors(text: str) -> set[str]:
    """The names that Markdown renderers give to headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@by_name
def test_lines_fit_the_page(page: Path) -> None:
    assert [n for n, line in enumerate(read(page).splitlines(), start=1) if len(line) > MAX_COLUMNS] == []


def test_diagrams_are_well_formed_titled_and_used() -> None:
    images = [(page.parent, target) for page in PAGES for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read(page))]
    used = {(folder / target).resolve() for folder, target in images}
    diagrams = sorted((DOCS / "diagrams").glob("*.svg"))
    assert used == {path.resolve() for path in diagrams}
    for path in diagrams:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_the_index_and_the_pages_link_each_other_in_order() -> None:
    index = read(DOCS / "README.md")
    linked = re.findall(r"\]\(learn/([\w-]+\.md)\)", index)
    assert linked == [page.name for page in PAGES]
    for page, following in itertools.pairwise(PAGES):
        assert f"]({following.name})" in read(page)
        assert f"]({page.name})" in read(following)


def test_the_runner_tells_a_wrong_output_and_the_line_of_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        textwrap.dedent("""\
        # A page

        ```python
        x = 2
        print(x)
        ```

        ```text
        3
        ```

        ```python
        print(x + 1)
        ```

        Prose between.

        ```text
        3
        ```
        """)
    )
    assert [(p.line, p.actual, p.stated) for p in run_python(page)] == [(4, "2", "3"), (13, "3", None)]
    page.write_text("```python\nx = 1\n\nraise ValueError(x)\n```\n")
    with pytest.raises(ValueError, match="1") as raised:
        list(run_python(page))
    assert raised.traceback[-1].lineno == 3  # counted from 0
    assert Path(raised.traceback[-1].path) == page


@pytest.mark.parametrize("line", ['    a["x"] -> b["y"]', "    a[x (y)] --> b", '    a["x"]', '    a["x"] --> '])
def test_the_check_of_flowcharts_finds(line: str) -> None:
    assert not _STATEMENT.fullmatch(line)
