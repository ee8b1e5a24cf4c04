"""Results as a table on a terminal, as aligned plain text elsewhere, and as JSON. Free of torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model.atomic_folder import replace_file
from training.errors import RecipeError


@dataclass(frozen=True, slots=True)
class ResultTable:
    """`text_columns`, counted from 0, hold words and stand left; the others hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Collection[int]

    def plain(self) -> str:
        """The title, then a line for each row, no wider than its cells."""
        lines = [self.columns, *self.rows] if any(self.columns) else self.rows
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        return "\n".join([self.title, *(self._line(line, widths) for line in lines)])

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", show_header=any(self.columns))
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number in self.text_columns else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        aligned = [
            cell.ljust(width) if number in self.text_columns else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()


def require_writable(option: str, path: Path | None, *, force: bool) -> None:
    """Before hours of measuring: raise RecipeError for a file that could not be written, or that would be lost."""
    if path is None:
        return
    if path.is_dir():
        raise RecipeError(f"{option} {path} is a folder; name a file")
    if not path.resolve().parent.is_dir():
        raise RecipeError(f"{option} {path}: its folder does not exist; make it first")
    if path.exists() and not force:
        raise RecipeError(f"{option} {path} already exists; choose another name or pass --force to replace it")


def show(values: dict[str, Any], tables: Sequence[ResultTable], *, as_json: bool, out: Path | None) -> None:
    """One JSON object, or the tables; the object also into `out`, whole or not at all.

    Raises CheckpointError when the disk refuses.
    """
    if out is not None:
        replace_file(out, json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")
    if as_json:
        print(json.dumps(values))
    elif sys.stdout.isatty():
        console = Console(markup=False, highlight=False)
        for table in tables:
            console.print(table.rich())
    else:
        print("\n\n".join(table.plain() for table in tables))
