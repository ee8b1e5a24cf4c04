"""The `python -m training …` commands that a text tells its readers to type, read by the real command line's parser."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer

from training.cli import app

_START = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:torchrun .*?-m training|python -m training)\b(.*)$")


def shell_commands(text: str) -> list[str]:
    """What stands behind `python -m training` in each such line; lines that end in a backslash are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [match[1].strip() for line in lines if (match := _START.match(line))]


def training_command(words: str) -> tuple[str, dict[str, Any]]:
    """The sub-command's name and its parameters. Raises what the parser raises for a line that it would refuse."""
    group: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(words, comments=True)
    with group.make_context("training", [name, *arguments]) as context:
        _, command, rest = group.resolve_command(context, [name, *arguments])
        with command.make_context(name, rest, parent=context) as sub_context:
            return name, sub_context.params
