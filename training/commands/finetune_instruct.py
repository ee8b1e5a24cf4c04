"""`python -m training finetune instruct`: a trained model learns to answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from training.commands.options import JsonFlag, model_folder, print_result
from training.launch import one_voice, share_cores


def finetune_instruct(
    init_from: Annotated[Path, typer.Option(help="checkpoint folder to start from, or a name on the Hub")],
    input: Annotated[
        list[str],
        typer.Option("--input", help='JSON array or JSON lines (also .gz, .zst) of {"instruction", "input", "output"} '
                                     'or {"messages": [{"role", "content"} …]}: file, folder or URL; repeat for more'),
    ],
    out: Annotated[Path, typer.Option(help="run folder; the same command goes on with a run that was stopped")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value of the recipe `instruct` …", metavar="KEY=VALUE")
    ] = None,
    epochs: Annotated[float, typer.Option(help="times that every example is seen")] = 2.0,
    lr: Annotated[
        float | None, typer.Option(help="peak learning rate; default 2e-5, of adapters 2e-4", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="rows per rank and micro-step")] = 8,
    max_seq_len: Annotated[
        int | None, typer.Option(help="tokens of a row; default: the model's context, at most 1024", show_default=False)
    ] = None,
    template: Annotated[
        Literal["alpaca", "chat"],
        typer.Option(help="how prompts are written; chat: the checkpoint's own template, or a plain one"),
    ] = "alpaca",
    packing: Annotated[
        bool, typer.Option(help="as many examples to a row as fit: faster, but they see each other")
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="train adapters of this rank, merged into checkpoints; 0 = off")] = 0,
    val_fraction: Annotated[float, typer.Option(help="share of the examples for validation")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="share of the examples for a test at the end")] = 0.0,
    sha256: Annotated[list[str] | None, typer.Option(help="digest of each URL's content, in their order")] = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="auto continues the run in --out; never refuses to")
    ] = "auto",
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Teach a checkpoint to follow instructions. The loss counts answers alone; before and after are told."""
    share_cores()
    from training.tasks.instruct import InstructRequest, finetune

    with one_voice():
        init_from = model_folder(init_from)
    request = InstructRequest(
        init_from=init_from, inputs=tuple(input), out=out, epochs=epochs, lr=lr, batch_size=batch_size,
        max_seq_len=max_seq_len, template=template, packing=packing, lora_rank=lora_rank, val_fraction=val_fraction,
        test_fraction=test_fraction, digests=tuple(sha256 or ()), overrides=tuple(overrides or ()),
    )  # fmt: skip
    result = finetune(request, resume, Console(stderr=as_json))
    if result is None:
        return
    best = out / "checkpoints" / "best"
    lines = [f"stopped and saved; the same command goes on in {out}"]
    if result.finished:
        lines = [
            f"loss of held-out answers: {_shown(result.before)} before, {_shown(result.after)} after {result.steps} "
            f"steps, {_shown(result.best)} at best (nats a token)",
            *([f"loss of the test answers: {_shown(result.test)}"] if result.test is not None else []),
            f"the best model is {best}",
        ]
    print_result(as_json, dataclasses.asdict(result) | {"checkpoint": str(best)}, lines=lines)


def _shown(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f}"
