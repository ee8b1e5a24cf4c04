"""`python -m training classify`: labels for texts, from a fine-tuned classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import DeviceOption, DtypeOption, JsonFlag, model_folder, print_result


def classify_command(
    checkpoint: Annotated[Path, typer.Argument(help="folder that `finetune classify` wrote, or transformers' like it")],
    text: Annotated[list[str] | None, typer.Option(help="a text to label; may be repeated")] = None,
    input: Annotated[
        Path | None, typer.Option(help="texts in place of --text: .txt (one a line), .tsv, .csv or .jsonl")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="name of the texts' column; default: text, or the 2nd of two without a header")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="name of the true labels' column; with labels, the answers are counted")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts at a time")] = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonFlag = False,
) -> None:
    """The likeliest label of each text and its probability; accuracy, F1 and confusion where true labels are given."""
    from training.build import DTYPES
    from training.errors import RecipeError
    from training.tasks.classification_data import Columns, read_texts
    from training.tasks.classification_predict import classify_texts

    if (input is None) == (not text):
        raise RecipeError("give either --text, as often as there are texts, or --input with a file of them")
    texts, labels = (text or [], None) if input is None else read_texts(input, Columns(text_column, label_column))
    found = classify_texts(
        model_folder(checkpoint), texts, labels, batch_size=batch_size, device=device, dtype=DTYPES[dtype]
    )  # fmt: skip
    values = {
        "results": [{"label": each.label, "score": each.score, "scores": each.scores} for each in found.items],
        "texts_cut": found.num_cut,
        "metrics": None if found.report is None else found.report.describe(),
    }
    if found.report is not None:
        lines = found.report.lines()
    else:
        lines = [f"{each.label}\t{each.score:.4f}\t{text}" for each, text in zip(found.items, texts, strict=True)]
    if found.num_cut:
        lines.append(f"{found.num_cut:,} texts are longer than the model reads and were cut at their end")
    print_result(as_json, values, lines)
