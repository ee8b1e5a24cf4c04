"""`python -m server batch`: a file of requests answered without HTTP, by the app and the engine of the server.

Exit codes: 0 when every line has an answer, refusals included; 1 when the engine could not start or died, or the disk
refused; 2 wrong usage; 130 and 143 after SIGINT and SIGTERM. Whatever ended it, the same command goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    RenderableColumn,
    SpinnerColumn,
    TimeRemainingColumn,
)

from server.batch_files import AnswerFile, read_requests
from server.batch_settings import BatchSettings
from server.engine.interface import EngineClient
from server.help import help_text, wants_help
from server.logs import setup_logging
from server.settings import UsageError, parse_settings, resolve_model_names

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
# Enough that a sequence waits whenever a seat becomes free.
_REQUESTS_PER_SEAT = 2


def main(argv: list[str]) -> int:
    """Run the sub-command and return its exit code."""
    if wants_help(argv):
        print(help_text(BatchSettings))
        return EXIT_OK
    try:
        settings = parse_settings(BatchSettings, argv)
        total = sum(1 for _ in read_requests(settings.input))
        answers = AnswerFile(settings.output)
        try:
            return _answer(settings, answers, total)
        finally:
            answers.close()
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except OSError as error:
        return _fail(f"--output: the file cannot be written ({error.strerror})", EXIT_FAILED)


def _answer(settings: BatchSettings, answers: AnswerFile, total: int) -> int:
    missing = sum(not answers.answers(request) for request in read_requests(settings.input))
    count = _Count(total, total - missing)
    code = EXIT_OK
    if missing:
        setup_logging("warning", "text")
        settings = resolve_model_names(settings)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_run(settings, answers, count))
    print(count.summary(settings.output.name), flush=True)
    return code


async def _run(settings: BatchSettings, answers: AnswerFile, count: _Count) -> int:
    """The exit code, once all is answered, a signal has come or the batch cannot go on."""
    from server.engine.client import AsyncEngine

    app_settings = settings.for_app()
    engine = AsyncEngine(app_settings.engine_config(), app_settings.max_queued_requests)
    stopped = _StopSignal()
    working = asyncio.create_task(_work(settings, answers, count, engine))
    stopping = asyncio.create_task(stopped.event.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
            return 128 + stopped.number
        return working.result()
    finally:
        stopping.cancel()
        await engine.close()


async def _work(settings: BatchSettings, answers: AnswerFile, count: _Count, engine: EngineClient) -> int:
    await engine.start()
    from server.app import create_app
    from server.batch import Batch, BatchStoppedError
    from server.serve import StartupError, load, tokenizer_of

    app = create_app(settings.for_app(), engine)
    try:
        await load(app.state.services, tokenizer_of)
        with count.shown(engine):
            batch = Batch(app, engine, answers, count, settings.seed)
            await batch.run(
                read_requests(settings.input), _REQUESTS_PER_SEAT * app.state.services.ready_info.max_num_seqs
            )
    except (StartupError, BatchStoppedError) as error:
        return _fail(str(error), EXIT_FAILED)
    return EXIT_OK


def _fail(message: str, code: int) -> int:
    print(f"quill: error: {message}", file=sys.stderr, flush=True)
    return code


class _StopSignal:
    """SIGINT and SIGTERM from the moment this exists; `number` is the first that came."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)

    def _stop(self, number: int) -> None:
        self.number = self.number or number
        self.event.set()


class _Rate:
    """Generated tokens per second, as rich draws it."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._started = time.monotonic()

    def __rich__(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._started)
        return f"{self._engine.stats.generation_tokens / seconds:,.0f} tokens/s"


class _Count:
    """Lines answered, on a progress bar and in words."""

    def __init__(self, total: int, kept: int) -> None:
        self.total = total
        self.kept = kept
        self.num_answered = 0
        self.num_refused = 0
        self._bar: Progress | None = None

    def advance(self, *, refused: bool) -> None:
        self.num_answered += 1
        self.num_refused += refused
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1)

    @contextlib.contextmanager
    def shown(self, engine: EngineClient) -> Iterator[None]:
        """A bar on a terminal's stderr, with the tokens that the engine makes in a second."""
        console = Console(stderr=True)
        bar = Progress(
            SpinnerColumn(), BarColumn(), MofNCompleteColumn(), RenderableColumn(_Rate(engine)), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        bar.add_task("answering", total=self.total, completed=self.kept)
        with bar:
            self._bar = bar
            yield
        self._bar = None

    def summary(self, name: str) -> str:
        unanswered = self.total - self.kept - self.num_answered
        notes = [
            *([f"{self.num_refused:,} of them refused"] if self.num_refused else []),
            *([f"{self.kept:,} were there already"] if self.kept else []),
            *([f"{unanswered:,} remain: run the same command again"] if unanswered else []),
        ]
        return f"{name}: {self.num_answered:,} lines answered" + "".join(f"; {note}" for note in notes)
