"""`python -m training report`: a run, or several beside each other, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import JsonFlag, print_result


def report_command(
    run_dirs: Annotated[list[Path], typer.Argument(help="run folder; several are compared", metavar="RUN_DIR...")],
    out: Annotated[
        Path | None,
        typer.Option(help="page to write; default: RUN_DIR/report.html, or comparison.html beside the first run"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a page with a run's curves, results and settings, or one that compares several runs."""
    from training.reporting.report_page import write_comparison, write_report
    from training.reporting.run_record import read_run

    if len(run_dirs) == 1:
        path = write_report(run_dirs[0], out)
    else:
        path = write_comparison(run_dirs, out or run_dirs[0].resolve().parent / "comparison.html")
    runs = [read_run(folder).summary() for folder in run_dirs]
    lines = [str(path)]
    for run in runs:
        best = (
            "no validation yet" if run["best_loss"] is None else f"best {run['best_loss']:.4f} at {run['best_step']:,}"
        )
        lines.append(f"{run['run_id']}: {run['status']}, {best}")
    print_result(as_json, {"report": str(path), "runs": runs}, lines)
