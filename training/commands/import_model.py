"""`python -m training import`: another trainer's checkpoint as a folder that the server loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from training.commands.options import JsonFlag, print_result


def import_command(
    file: Annotated[Path, typer.Argument(help="ckpt.pt, a folder with lit_model.pth, or llm.c's model .bin")],
    out: Annotated[Path, typer.Option(help="checkpoint folder to write; new or empty")],
    format: Annotated[
        Literal["auto", "nanogpt", "litgpt", "llmc"], typer.Option(help="auto goes by names and first bytes")
    ] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2, or a tokenizer.json or its folder; default: by what the checkpoint holds")
    ] = None,
    characters: Annotated[
        Path | None, typer.Option(help="of a character model: its training text, or .json with stoi, itos or a list")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="type of the saved weights; auto keeps it")
    ] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Turn a checkpoint of nanoGPT, litgpt or llm.c into a folder that the server and transformers load."""
    from model.config import count_parameters
    from training.build import DTYPES
    from training.importers.convert import ImportRequest, import_model

    result = import_model(ImportRequest(
        file, out, format=None if format == "auto" else format, tokenizer=tokenizer, characters=characters,
        dtype=None if dtype == "auto" else DTYPES[dtype],
    ))  # fmt: skip
    config, facts = result.config, result.manifest.provenance
    saved_as = str(result.dtype).removeprefix("torch.")
    values = {
        "out": str(out), "format": result.format, "architecture": config.architecture,
        "parameters": count_parameters(config), "vocab_size": config.vocab_size, "padding_removed": result.padding,
        "max_seq_len": config.max_seq_len, "dtype": saved_as, "step": facts.step,
        "validation_loss": facts.validation_loss, "weights": result.manifest.weights,
    }  # fmt: skip
    padding = f" ({result.padding} rows of padding cut off)" if result.padding else ""
    print_result(as_json, values, lines=[
        f"{out}: {config.architecture} with {values['parameters']:,} parameters in {saved_as}, "
        f"vocabulary {config.vocab_size:,}{padding}, context {config.max_seq_len:,}",
        f"serve it: python -m server --model {out}",
    ])  # fmt: skip
