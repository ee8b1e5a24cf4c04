"""Markdown pages as programs: their fenced blocks, and their Python run from top to bottom in one namespace."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(```+)([\w-]*)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, the page's line on which the text begins, and what precedes it."""

    language: str
    text: str
    line: int
    directly_after: Block | None


@dataclass(frozen=True, slots=True)
class Printed:
    """What a Python block printed, and what the page says that it prints (None: nothing stands there)."""

    line: int
    actual: str
    stated: str | None


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a page. A block is `directly_after` another if only blank lines lie between."""
    blocks: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        previous = blocks[-1] if blocks and not text[end : match.start()].strip() else None
        blocks.append(Block(match[2], match[3], text.count("\n", 0, match.start(3)) + 1, previous))
        end = match.end()
    return blocks


def run_python(path: Path, run_shell: Callable[[str], None] | None = None) -> Iterator[Printed]:
    """Execute a page's Python blocks in order, as one module; a traceback names the page and its line.

    `run_shell` gets the text of the shell blocks that stand between them.
    """
    blocks = fenced_blocks(path.read_text(encoding="utf-8"))
    stated = {id(block.directly_after): block.text for block in blocks if block.language == "text"}
    module = types.ModuleType(f"page_{path.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        for block in blocks:
            if block.language == "sh" and run_shell is not None:
                run_shell(block.text)
            elif block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(code, module.__dict__)
                yield Printed(block.line, output.getvalue().rstrip(), _stripped(stated.get(id(block))))
    finally:
        del sys.modules[module.__name__]


def _stripped(text: str | None) -> str | None:
    return None if text is None else text.rstrip()
