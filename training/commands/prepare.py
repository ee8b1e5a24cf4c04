"""`python -m training prepare`: text into token shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from training.commands.options import JsonFlag, print_result
from training.prepare import PrepareRequest, prepare


def prepare_command(
    input: Annotated[list[str], typer.Option("--input", help="text file, URL, or the short name tinyshakespeare")],
    out: Annotated[Path, typer.Option(help="data folder to write")],
    more: Annotated[list[str] | None, typer.Argument(help="further inputs", metavar="INPUT")] = None,
    tokenizer: Annotated[str, typer.Option(help="gpt2, char, bytes, or a tokenizer.json or its folder")] = "gpt2",
    val_fraction: Annotated[float, typer.Option(help="share of the characters, from the end, for validation")] = 0.1,
    sha256: Annotated[list[str] | None, typer.Option(help="digest of each URL's content, in their order")] = None,
    workers: Annotated[int, typer.Option(help="processes that tokenise")] = 1,
    force: Annotated[bool, typer.Option(help="replace other prepared data in --out")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn text into token shards with a manifest, split into training and validation."""
    request = PrepareRequest(
        inputs=(*input, *(more or ())), out=out, tokenizer=tokenizer, val_fraction=val_fraction,
        digests=tuple(sha256 or ()), workers=workers, force=force,
    )  # fmt: skip
    with Progress(console=Console(stderr=True), disable=as_json or not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokenising", total=None)
        manifest, written = prepare(
            request, on_progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    splits = {
        name: {"tokens": split.tokens, "bytes": split.bytes, "characters": split.characters}
        for name, split in manifest.splits.items()
    }
    print_result(as_json, {"out": str(out), "vocab_size": manifest.vocab_size, "written": written, **splits}, lines=[
        f"{out}: {'written' if written else 'already prepared'}, vocabulary {manifest.vocab_size:,}",
        *(f"{name}: {s['tokens']:,} tokens, {s['characters']:,} characters" for name, s in splits.items()),
    ])  # fmt: skip
