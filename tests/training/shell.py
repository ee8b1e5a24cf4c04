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
    name, *arguments = shlex.split(words, comments=True)
    return name, _parameters(typer.main.get_command(app), None, "training", [name, *arguments])


def _parameters(command: Any, parent: Any, name: str, arguments: list[str]) -> dict[str, Any]:
    """What the innermost command would be called with."""
    with command.make_context(name, list(arguments), parent=parent) as context:
        if not hasattr(command, "resolve_command"):
            return dict(context.params)
        inner_name, inner, rest = command.resolve_command(context, list(arguments))
        return _parameters(inner, context, inner_name, rest)
