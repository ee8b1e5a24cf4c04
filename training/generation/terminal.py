"""Lines from the keyboard or a pipe, and text that cannot take over the terminal. Free of torch."""

from __future__ import annotations

import contextlib
import sys

_PICTURES = 0x2400
_CONTROL = {code: _PICTURES + code for code in range(0x20) if chr(code) not in "\n\t"}
_CONTROL |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0x2426)


def printable(text: str) -> str:
    """On a terminal, control characters that a model may write (ESC above all) become their pictures; else the text."""
    return text.translate(_CONTROL) if sys.stdout.isatty() else text


def read_line() -> str:
    """A line without its end; with a prompt, editing and history where there is a keyboard. Raises EOFError."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (gives input() its editing)
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
