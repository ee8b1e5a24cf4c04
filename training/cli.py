"""The command line: one sub-command for each file of `training/commands`.

Commands import what they need when they run, so that `--help` and a typing mistake cost no import of torch.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

import typer

from model.errors import QuillError
from training.commands.classify import classify_command
from training.commands.evaluate import evaluate
from training.commands.export import export
from training.commands.finetune_classify import finetune_classify
from training.commands.finetune_instruct import finetune_instruct
from training.commands.generate import generate_command
from training.commands.import_model import import_command
from training.commands.info import info
from training.commands.latency import latency_command
from training.commands.prepare import prepare_command
from training.commands.recipe import recipe_command
from training.commands.report import report_command
from training.commands.selftest import selftest_command
from training.commands.tokenizer import tokenizer_app
from training.commands.train import EPILOG, train

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    help="Prepare text, train small GPTs on it, evaluate and sample them.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.command("prepare")(prepare_command)
app.command("info")(info)
app.command("recipe")(recipe_command)
app.command("train", epilog=EPILOG)(train)
app.command("evaluate")(evaluate)
app.command("latency")(latency_command)
app.command("generate")(generate_command)
app.command("selftest")(selftest_command)
app.command("report")(report_command)
app.command("import")(import_command)
app.command("export")(export)
finetune = typer.Typer(help="Teach a trained model a task.", no_args_is_help=True)
app.add_typer(finetune, name="finetune")
finetune.command("instruct")(finetune_instruct)
finetune.command("classify")(finetune_classify)
app.command("classify")(classify_command)
app.add_typer(tokenizer_app, name="tokenizer")


def main() -> None:
    """Runs the command line. A user's mistake is one line on stderr and exit status 1."""
    try:
        _run()
    except QuillError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read the output has had enough
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:  # files are named where they are written
            _drop_output()
            _fail(f"standard output cannot be written: {error.strerror}")
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _run() -> None:
    try:
        app(prog_name="python -m training")
    except SystemExit:
        sys.stdout.flush()  # here a refusal can still be told
        raise


def _drop_output() -> None:
    """What waits to be printed cannot be; Python would try once more when it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
