"""`python -m training evaluate`: how well a checkpoint predicts a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import DeviceOption, DtypeOption, JsonFlag, print_result


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    data: Annotated[Path | None, typer.Option(help="prepared data folder")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file, in place of --data")] = None,
    split: Annotated[str, typer.Option(help="split of --data: train, val, or test where it was prepared")] = "val",
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
        "loss": result.loss,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,  # JSON has no infinity
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
    }
    print_result(as_json, values, lines=[
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.3f}, "
        f"{result.bits_per_byte:.4f} bits per byte, over {result.tokens:,} tokens"
    ])  # fmt: skip
