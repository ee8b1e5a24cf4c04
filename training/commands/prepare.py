"""`python -m training prepare`: text into token shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from training.commands.options import JsonFlag, print_result
from training.data.prepare import PrepareRequest, prepare
from training.data.shards import DataManifest
from training.errors import RecipeError

_console = Console(stderr=True)


def prepare_command(
    input: Annotated[
        list[str],
        typer.Option("--input", help="file (.txt, .md, .jsonl, .json, .parquet, with .gz or .zst), folder, URL, "
                                     "hf:OWNER/NAME:CONFIG@SPLIT (both optional), or the short name tinyshakespeare"),
    ],
    out: Annotated[Path, typer.Option(help="data folder to write")],
    more: Annotated[list[str] | None, typer.Argument(help="further inputs", metavar="INPUT")] = None,
    tokenizer: Annotated[str, typer.Option(help="gpt2, char, bytes, or a tokenizer.json or its folder")] = "gpt2",
    val_fraction: Annotated[float, typer.Option(help="share of the text for validation")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="share of the text for a test split")] = 0.0,
    split: Annotated[
        Literal["auto", "tail", "documents"],
        typer.Option(help="tail: the last text; documents: whole documents by their hash; auto: tail for plain files"),
    ] = "auto",
    documents: Annotated[
        Literal["file", "line", "blank-line"], typer.Option(help="what ends a document of a plain text file")
    ] = "file",
    text_key: Annotated[
        list[str] | None, typer.Option(help="field of a row that holds its text (default: text); several are joined")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="field of a row whose value becomes a control token before the text, such as <|meter:doha|>; "
                          "repeat it in the order in which they shall stand"),
    ] = None,
    add_token: Annotated[
        list[str] | None, typer.Option(help="text that becomes one token of the tokenizer; repeat for more")
    ] = None,
    add_special_token: Annotated[
        list[str] | None, typer.Option(help="control token to add, which no text produces; repeat for more")
    ] = None,
    template: Annotated[
        Literal["alpaca", "chat"] | None,
        typer.Option(help="the inputs are instructions or conversations, to be written by this template: see "
                          "`finetune instruct`; --tokenizer names the model's folder"),
    ] = None,
    sha256: Annotated[list[str] | None, typer.Option(help="digest of each URL's content, in their order")] = None,
    workers: Annotated[int, typer.Option(help="processes that tokenise; 0 = one per core, if the text is large")] = 0,
    force: Annotated[bool, typer.Option(help="replace other prepared data in --out")] = False,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Turn text into token shards with a manifest, split into training, validation and test."""
    inputs, digests = (*input, *(more or ())), tuple(sha256 or ())
    if template is not None:
        if text_key or control or add_token or add_special_token or (split, documents) != ("auto", "file"):
            raise RecipeError("--template reads whole conversations; leave out what divides or labels text")
        from training.tasks.instruct_data import InstructDataRequest, prepare_instructions

        examples = InstructDataRequest(inputs, out, tokenizer, template, val_fraction, test_fraction, digests, force)
        _print(out, *prepare_instructions(examples, on_notice=_notice), as_json)
        return
    request = PrepareRequest(
        inputs=inputs, out=out, tokenizer=tokenizer, val_fraction=val_fraction,
        test_fraction=test_fraction, digests=digests, workers=workers, force=force, documents=documents,
        split=split, text_keys=tuple(text_key or ("text",)), control_keys=tuple(control or ()),
        special_tokens=tuple(add_special_token or ()), text_tokens=tuple(add_token or ()),
    )  # fmt: skip
    with _progress(hidden=as_json) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        manifest, written = prepare(request, on_progress=on_progress, on_notice=_notice)
    _print(out, manifest, written, as_json)


def _progress(*, hidden: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=_console, disable=hidden or not sys.stderr.isatty())


def _notice(line: str) -> None:
    _console.print(f"notice: {line}", style="yellow", markup=False, soft_wrap=True)


def _print(out: Path, manifest: DataManifest, written: bool, as_json: bool) -> None:
    splits = {
        name: {
            "tokens": split.tokens,
            "bytes": split.bytes,
            "characters": split.characters,
            "documents": split.documents,
        }
        for name, split in manifest.splits.items()
    }
    values = {"out": str(out), "vocab_size": manifest.vocab_size, "written": written, "controls": manifest.controls}
    print_result(as_json, values | splits, lines=[
        f"{out}: {'written' if written else 'already prepared'}, vocabulary {manifest.vocab_size:,}",
        *(f"{name}: {s['tokens']:,} tokens, {s['characters']:,} characters, {s['documents']:,} documents"
          for name, s in splits.items()),
        *(f"control {name}: {', '.join(known)}" for name, known in manifest.controls.items()),
    ])  # fmt: skip
