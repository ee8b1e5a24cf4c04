"""`python -m training export`: a checkpoint without padding, with a model card, checked after writing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from training.commands.options import JsonFlag, model_folder, print_result


def export(
    source: Annotated[Path, typer.Argument(help="checkpoint folder, a run folder, or a name on the Hub")],
    out: Annotated[Path, typer.Option(help="folder to write; new or empty")],
    which: Annotated[str | None, typer.Option(help="of a run folder: best (the default), last or step-N")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="type of the weights; auto keeps it")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="size beyond which weights are split into files")] = "5GB",
    as_json: JsonFlag = False,
) -> None:
    """Write what transformers, llama.cpp's converter and vLLM load, with a model card, and check it by loading it."""
    from training.build import DTYPES
    from training.export import export_checkpoint, parse_size

    result = export_checkpoint(
        model_folder(source), out, which=which, dtype=None if dtype == "auto" else DTYPES[dtype],
        max_shard_bytes=parse_size(max_shard_size),
    )  # fmt: skip
    saved_as, facts = str(result.dtype).removeprefix("torch."), result.manifest.provenance
    values = {
        "out": str(out), "source": str(result.source), "dtype": saved_as, "vocab_size": result.vocab_size,
        "padding_removed": result.padding, "step": facts.step, "validation_loss": facts.validation_loss,
        "rounding_error": result.rounding_error, "export_error": result.export_error,
        "files": sorted(result.manifest.files), "weights": result.manifest.weights,
    }  # fmt: skip
    print_result(as_json, values, lines=[
        f"{out}: {result.source} in {saved_as}, {result.vocab_size:,} tokens, {result.padding} rows of padding cut",
        f"loaded again: logits within {result.export_error:.1e} of the source's in {saved_as}, "
        f"which differ by {result.rounding_error:.1e} from those before rounding",
    ])  # fmt: skip
