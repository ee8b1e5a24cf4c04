"""What rank 0 tells of a run: the terminal, metrics.jsonl, the recipe's trackers and report.html."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from training.config import TrainConfig
from training.metrics import MetricsLog
from training.reporting.report import Reporter
from training.reporting.trackers import make_trackers

_PAGE_SECONDS = 30.0


class RunLog:
    """Opened at a step: what an interrupted run logged beyond it is forgotten. `is_main` False writes nothing."""

    def __init__(self, config: TrainConfig, run_id: str, step: int, console: Console, *, is_main: bool) -> None:
        self.report = Reporter(
            console if is_main else Console(quiet=True), config.train.max_steps, first_step=step,
            sample_prompt=config.run.sample_prompt, sample_tokens=config.run.sample_tokens, seed=config.train.seed,
        )  # fmt: skip
        self._run_dir = Path(config.run.dir)
        self._trackers = make_trackers(config, run_id) if is_main else None
        self._metrics = MetricsLog(self._run_dir / "metrics.jsonl", step) if is_main else None
        self._page_due = time.monotonic() + _PAGE_SECONDS if is_main else None

    def write(self, **values: Any) -> None:
        """One object of metrics.jsonl; NaN and infinity become null."""
        if self._metrics is not None and self._trackers is not None:
            self._metrics.write(**values)
            self._trackers.log(values)

    def page(self, *, now: bool) -> None:
        """Writes report.html, unless the last one is not old and it need not be `now`.

        A run is worth more than its report: the first failure is told and later ones are not tried.
        """
        if self._page_due is None or (time.monotonic() < self._page_due and not now):
            return
        try:
            write_page(self._run_dir)
            self._page_due = time.monotonic() + _PAGE_SECONDS
        except Exception as error:
            self._page_due = None
            self.report.line(f"report.html cannot be written ({error}); the run goes on without it")

    def close(self) -> None:
        if self._metrics is not None and self._trackers is not None:
            self._metrics.close()
            self._trackers.close()


def write_page(run_dir: Path) -> None:
    from training.reporting.report_page import write_report  # its plotting library takes a second to import

    write_report(run_dir)
