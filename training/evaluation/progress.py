"""How a measurement tells where it stands. Free of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

# (what is being done, how much of it is done, how much there is or None where that is not known)
OnProgress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    pass


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[OnProgress]:
    """A bar on stderr for each thing that is being done; nothing where stderr is no terminal, or not `enabled`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), disable=not enabled or not sys.stderr.isatty(), transient=True
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield on_progress
