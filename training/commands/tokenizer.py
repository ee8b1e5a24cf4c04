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


@tokenizer_app.command("analyze")
def analyze_command(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER…", help="gpt2, bytes, char (the text's characters), a tokenizer.json or its folder"
        ),
    ],
    input: InputOption = None,
    plot: Annotated[Path | None, typer.Option(help="draw bars into this .png, .svg or .pdf")] = None,
    text_key: TextKeyOption = None,
    sha256: Sha256Option = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare tokenizers on a text: length in tokens, compression, unknown words."""
    from training.tokenizers.analyze import analyze
    from training.tokenizers.plot import check_plot_path, plot_analyses

    if plot is not None:
        check_plot_path(plot)
    with _progress(as_json) as (on_progress, on_notice):
        request = _corpus(input, None, sha256, text_key)
        rows = analyze(tokenizers, request, on_progress=on_progress, on_notice=on_notice)
    if plot is not None:
        plot_analyses(rows, plot)
    measured = ("tokens_per_word", "characters_per_token", "bytes_per_token", "unknown_rate", "whole_rate")
    values = [
        {"tokenizer": row.name, "kind": row.kind, "vocab_size": row.vocab_size, "tokens": row.tokens}
        | {name: getattr(row, name) for name in measured}
        for row in rows
    ]
    text = {"characters": rows[0].characters, "bytes": rows[0].num_bytes, "words": rows[0].words}
    plotted = {} if plot is None else {"plot": str(plot)}
    heads = ("vocabulary", "tokens", "tokens/word", "chars/token", "bytes/token", "unknown", "whole")
    width = max(len("tokenizer"), *(len(row.name) for row in rows))
    print_result(as_json, {"text": text, "tokenizers": values, **plotted}, [
        f"{text['characters']:,} characters, {text['bytes']:,} bytes, {text['words']:,} words",
        f"{'tokenizer':{width}} " + " ".join(f"{head:>11}" for head in heads),
        *(f"{row.name:{width}} {row.vocab_size:11,} {row.tokens:11,} {row.tokens_per_word:11.3f} "
          f"{row.characters_per_token:11.3f} {row.bytes_per_token:11.3f} "
          f"{row.unknown_rate:11.2%} {row.whole_rate:11.2%}"
          for row in rows),
        *([] if plot is None else [f"plot: {plot}"]),
    ])  # fmt: skip


@tokenizer_app.command("show")
def show_command(
    tokenizer: Annotated[str, typer.Argument(help="gpt2, bytes, a tokenizer.json or its folder")],
    text: Annotated[str, typer.Argument(help="text to take apart")],
    as_text: Annotated[
        bool, typer.Option("--as-text", help="read special tokens in the text as text, as in what users send")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Take a text apart: each token's id, bytes, text and place."""
    from training.data.named_tokenizer import named_tokenizer
    from training.tokenizers.show import walk_through

    shown = walk_through(named_tokenizer(tokenizer, "TOKENIZER"), text, read_special=not as_text)
    pieces = [
        {"id": piece.token_id, "bytes": piece.data.hex(), "text": piece.text, "token": piece.spelling,
         "start": piece.start, "end": piece.end, "special": piece.is_special}
        for piece in shown.pieces
    ]  # fmt: skip
    values = {
        "text": shown.text, "normalized": shown.normalized, "pieces": pieces, "decoded": shown.decoded,
        "round_trip": shown.round_trip, "exact": shown.decoded == shown.plain,
    }  # fmt: skip
    normalized = [] if shown.normalized == shown.plain else [f"normalised: {shown.normalized!r}"]
    rows = (
        f"{number:5} {piece.token_id:8} {piece.start:>5}–{piece.end:<5} {piece.data.hex(' '):24} {piece.literal}"
        + ("  special" if piece.is_special else "")
        for number, piece in enumerate(shown.pieces)
    )
    trip = "ok" if shown.round_trip else f"not ok, the tokens decode to {shown.decoded!r}"
    print_result(as_json, values, [
        f"{len(text):,} characters, {len(text.encode()):,} bytes, {len(pieces):,} tokens",
        *normalized,
        f"{'':5} {'id':>8} {'characters':11} {'bytes':24} text",
        *rows,
        f"round trip: {trip}",
    ])  # fmt: skip
