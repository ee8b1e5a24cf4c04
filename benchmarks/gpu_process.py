"""Run one part of the GPU benchmark in a process of its own, with a limit of time.

A kernel that goes astray breaks CUDA for its whole process, and one that hangs never comes back: neither must take the
other parts along.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from benchmarks.gpu_job import NO_TIME, Job
from server.engine.environment import engine_environment

ROOT = Path(__file__).parents[1]
# Between a part's own last look at the clock and the end of its process.
_GRACE = 5.0
_LOG_TAIL = 1_500


@dataclass(frozen=True, slots=True)
class Part:
    """A name that `benchmarks.gpu_part` knows, and the seconds that it may take at most."""

    name: str
    limit: float


def run_part(part: Part, job: Job, seconds_left: float, least: float = 15.0) -> dict[str, Any]:
    """The part's `figures` by name, its `seconds`, and `error` if it ended badly; `skipped` if fewer than `least`
    seconds are left for it."""
    limit = min(part.limit, seconds_left)
    if limit < least:
        return {"figures": {}, **NO_TIME}
    started = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures_file, log_file = Path(folder) / "figures", Path(folder) / "log"
        figures_file.touch()
        error = _run(part.name, replace(job, limit=max(limit - _GRACE, 0.0)), limit, figures_file, log_file)
        result: dict[str, Any] = {"figures": read_figures(figures_file), "seconds": round(perf_counter() - started, 1)}
    return result if error is None else {**result, "error": error}


def read_figures(path: Path) -> dict[str, Any]:
    """Those that were written whole."""
    lines = path.read_text().split("\n")[:-1]
    entries = [json.loads(line) for line in lines]
    return {entry["name"]: entry["value"] for entry in entries}


def _run(name: str, job: Job, limit: float, figures_file: Path, log_file: Path) -> str | None:
    """What went wrong, or None."""
    command = [sys.executable, "-m", "benchmarks.gpu_part", name, str(figures_file), msgspec.json.encode(job).decode()]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=engine_environment(os.environ), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"ended after its {limit:.0f} s"
        finally:
            _end_group(process)
    if code == 0:
        return None
    return f"exit code {code}: {log_file.read_text(errors='replace')[-_LOG_TAIL:].strip()}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started, such as a server; harmless if all of them are gone."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
