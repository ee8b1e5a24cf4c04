"""`python -m training finetune classify`: a language model becomes a classifier of texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from training.commands.options import DeviceOption, JsonFlag, model_folder, print_result


def finetune_classify(
    init_from: Annotated[Path, typer.Option(help="checkpoint folder of a language model, or its name on the Hub")],
    input: Annotated[Path, typer.Option(help=".tsv, .csv or .jsonl, also .gz or .zst: a text and a label in each row")],
    out: Annotated[Path, typer.Option(help="folder to write; new or empty")],
    text_column: Annotated[
        str | None, typer.Option(help="name of the texts' column; default: text, or the 2nd of two without a header")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="name of the labels' column; default: label, or the 1st of two without a header")
    ] = None,
    epochs: Annotated[int, typer.Option(help="times that every text is read")] = 3,
    lr: Annotated[float, typer.Option(help="peak learning rate; small models want a larger one")] = 5e-5,
    batch_size: Annotated[int, typer.Option(help="texts in a step")] = 16,
    weight_decay: Annotated[float, typer.Option(help="decay of matrices, times the learning rate")] = 0.01,
    val_fraction: Annotated[float, typer.Option(help="share of the texts that chooses the best epoch; 0 = none")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="share that is measured once, at the end; 0 = none")] = 0.2,
    seed: Annotated[int, typer.Option(help="of the split, the head's first weights, the order and dropout")] = 0,
    max_seq_len: Annotated[
        int | None, typer.Option(help="tokens after which texts are cut, here and in use; default: the context")
    ] = None,
    freeze_layers: Annotated[int, typer.Option(help="leave the embedding and that many first layers as they are")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="type of products; weights are float32")]
    = "float32",
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Train a head on the last token's hidden state, and the model with it, to label texts.

    The weights of the best epoch are saved in the format of transformers' …ForSequenceClassification. SIGTERM and
    Ctrl-C stop the run and keep the best weights so far; a stopped run is not continued, as a whole one takes minutes.
    """
    from training.stop import StopSignals
    from training.tasks.classification import finetune_classifier
    from training.tasks.classification_data import Columns
    from training.tasks.classification_request import FinetuneRequest
    from training.tasks.classification_save import describe

    request = FinetuneRequest(
        model_folder(init_from), input, out, Columns(text_column, label_column), epochs=epochs, lr=lr,
        batch_size=batch_size, weight_decay=weight_decay, val_fraction=val_fraction, test_fraction=test_fraction,
        seed=seed, max_seq_len=max_seq_len, freeze_layers=freeze_layers, dtype=dtype, device=device,
    )  # fmt: skip
    stop = StopSignals()
    with stop.installed():
        result = finetune_classifier(request, lambda line: print(line, file=sys.stderr, flush=True), stop)
    if result is None:
        print_result(
            as_json, {"out": None, "stopped": True}, ["stopped before the first epoch's end: nothing was saved"]
        )
        return
    values = {"out": str(out), "seconds": round(result.seconds, 1), **describe(request, result)}
    report, part = (result.test, "test") if result.test is not None else (result.best.validation, "validation")
    lines = [] if report is None else [f"{part} part, {report.total:,} texts:", *report.lines(), ""]
    if result.stopped:
        lines.append("stopped by a signal; the best weights so far were kept, the test part was not measured")
    lines += [
        f"{out}: weights of epoch {result.best.number}, after {result.seconds:.0f} s",
        f"use it: python -m training classify {out} --text '…'",
        f"serve it: python -m server --model {out}",
    ]
    print_result(as_json, values, lines)
