"""`python -m training tokenizer train | analyze | show`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from training.commands.options import JsonFlag, print_result
from training.data.prepare import OnProgress
from training.tokenizers.corpus import CorpusRequest

tokenizer_app = typer.Typer(
    help="Train a tokenizer, compare several on a text, and see what one does.", no_args_is_help=True
)

InputOption = Annotated[
    list[str] | None, typer.Option("--input", help="as in prepare: file, folder, URL, hf:OWNER/NAME or a short name")
]
MoreInputs = Annotated[list[str] | None, typer.Argument(help="further inputs", metavar="INPUT")]
TextKeyOption = Annotated[
    list[str] | None, typer.Option(help="field of a row that holds its text (default: text); several are joined")
]
Sha256Option = Annotated[list[str] | None, typer.Option(help="digest of each URL's content, in their order")]


@tokenizer_app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="folder to write")],
    kind: Annotated[
        Literal["bpe", "wordpiece", "char", "bytes"],
        typer.Option(help="bpe: byte-level pairs as in GPT-2; wordpiece: BERT's, with ## and [UNK]; char: the text's "
                          "characters; bytes: needs no text"),
    ],
    input: InputOption = None,
    more: MoreInputs = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="tokens at most, special ones included; needed for bpe and wordpiece")
    ] = None,
    normalize: Annotated[
        Literal["none", "nfc", "nfkc"], typer.Option(help="Unicode form that text is brought into, here and ever after")
    ] = "none",
    pretokenizer: Annotated[
        Literal["gpt2", "devanagari", "whitespace"] | None,
        typer.Option(help="what a word is. gpt2 (default): letters, digits or signs; devanagari: the same, marks "
                          "and joiners kept with their letters, for Indic and other scripts; whitespace: all between "
                          "spaces"),
    ] = None,
    special: Annotated[list[str] | None, typer.Option(help="further special token, beside <|endoftext|>")] = None,
    min_frequency: Annotated[
        int | None, typer.Option(help="how often a pair must occur to become a token (default 2)")
    ] = None,
    lowercase: Annotated[bool, typer.Option("--lowercase", help="make text lower case")] = False,
    text_key: TextKeyOption = None,
    sha256: Sha256Option = None,
    force: Annotated[bool, typer.Option(help="replace another tokenizer in --out")] = False,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Learn a vocabulary from text: tokenizer.json and tokenizer_config.json in Hugging Face's format."""
    from training.tokenizers.train import TrainRequest, train_tokenizer

    request = TrainRequest(
        corpus=_corpus(input, more, sha256, text_key), out=out, kind=kind, vocab_size=vocab_size, normalize=normalize,
        lowercase=lowercase, pretokenizer=pretokenizer, special=tuple(special or ()), min_frequency=min_frequency,
        force=force,
    )  # fmt: skip
    with _progress(as_json) as (on_progress, on_notice):
        trained = train_tokenizer(request, on_progress=on_progress, on_notice=on_notice)
    tokenizer = trained.tokenizer
    values = {
        "out": str(out), "kind": kind, "vocab_size": tokenizer.vocab_size, "special_tokens": tokenizer.special_tokens,
        "characters": trained.characters, "tokens": trained.tokens, "runs_through": trained.runs_through,
    }  # fmt: skip
    special_texts = ", ".join(f"{token} {i}" for token, i in tokenizer.special_tokens.items())
    print_result(as_json, values, [
        f"{out}: vocabulary {tokenizer.vocab_size:,}, special tokens {special_texts}",
        f"the text: {trained.characters:,} characters in {trained.tokens:,} tokens, "
        f"{trained.characters / max(1, trained.tokens):.2f} characters a token",
        f"runs through {trained.runs_through}"
        + (", with the ids of tokenizers on the whole text" if trained.runs_through != "tokenizers" else ""),
    ])  # fmt: skip


def _corpus(
    inputs: list[str] | None, more: list[str] | None, sha256: list[str] | None, text_key: list[str] | None
) -> CorpusRequest:
    return CorpusRequest((*(inputs or ()), *(more or ())), tuple(sha256 or ()), tuple(text_key or ("text",)))


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[OnProgress, Callable[[str], None]]]:
    """A bar on stderr for each thing that is done, and a line there for each notice."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty()) as bar:
        tasks: dict[str, int] = {}

        def on_progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        def on_notice(line: str) -> None:
            console.print(f"notice: {line}", style="yellow", markup=False, soft_wrap=True)

        yield on_progress, on_notice
