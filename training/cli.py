"""The command line: prepare, train, evaluate, generate.

Commands import what they need when they run, so that `--help` and a typing mistake cost no import of torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from model.errors import QuillError
from training.prepare import PrepareRequest, prepare
from training.recipe import describe_fields, load_config

app = typer.Typer(
    help="Prepare text, train small GPTs on it, evaluate and sample them.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

JsonFlag = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
DtypeOption = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="type of weights and products")]


@app.command("prepare")
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
    _result(as_json, {"out": str(out), "vocab_size": manifest.vocab_size, "written": written, **splits}, lines=[
        f"{out}: {'written' if written else 'already prepared'}, vocabulary {manifest.vocab_size:,}",
        *(f"{name}: {s['tokens']:,} tokens, {s['characters']:,} characters" for name, s in splits.items()),
    ])  # fmt: skip


@app.command(epilog="Keys, their defaults and meaning:\n\n" + describe_fields())
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe, such as training/configs/shakespeare.toml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="auto continues the run in run.dir; never refuses to")
    ] = "auto",
) -> None:
    """Train by a recipe. SIGTERM saves and exits 0; the same command then goes on where it stopped."""
    config = load_config(recipe, overrides or ())
    from training.run import run_training

    run_training(config, resume, Console())


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    data: Annotated[Path | None, typer.Option(help="prepared data folder")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file, in place of --data")] = None,
    split: Annotated[str, typer.Option(help="split of --data")] = "val",
    seq_len: Annotated[int | None, typer.Option(help="window; default: the model's context")] = None,
    stride: Annotated[int | None, typer.Option(help="predictions that count in a window; default: all")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows at a time")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Loss, perplexity and bits per byte over a whole split or text file."""
    from training.build import DTYPES
    from training.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        checkpoint, data=data, split=split, text=text, seq_len=seq_len, stride=stride,
        batch_size=batch_size, device=device, dtype=DTYPES[dtype],
    )  # fmt: skip
    values = {
        "loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
    }  # fmt: skip
    _result(as_json, values, lines=[
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.3f}, "
        f"{result.bits_per_byte:.4f} bits per byte, over {result.tokens:,} tokens"
    ])  # fmt: skip


@app.command("generate")
def generate_command(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    prompt: Annotated[str, typer.Option(help="text to continue; empty starts from the end-of-text token")] = "",
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 256,
    temperature: Annotated[float, typer.Option(help="0 = greedy")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 = off")] = 0,
    top_p: Annotated[float, typer.Option(help="1 = off")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 = off")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 = off")] = 1.0,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text")] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="texts to generate, with seeds seed, seed + 1 …")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Continue a prompt with a checkpoint."""
    from dataclasses import replace

    from model.sampling_params import SamplingParams
    from training.build import DTYPES
    from training.generate import generate_from_checkpoint

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    each = [replace(params, seed=seed + number) for number in range(num_samples)]
    samples = generate_from_checkpoint(checkpoint, prompt, each, device=device, dtype=DTYPES[dtype])
    values = {"prompt": prompt, "samples": [
        {"text": s.text, "token_ids": s.token_ids, "finish_reason": s.finish_reason, "seed": s.seed} for s in samples
    ]}  # fmt: skip
    _result(as_json, values, lines=[prompt + sample.text for sample in samples])


def _result(as_json: bool, values: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(values) if as_json else "\n".join(lines))


def main() -> None:
    """Runs the command line. A user's mistake is one line on stderr and exit status 1."""
    try:
        app(prog_name="python -m training")
    except (QuillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
