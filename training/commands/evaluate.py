"""`python -m training evaluate`: how well a checkpoint predicts, chooses and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from training.commands.options import DeviceOption, DtypeOption, JsonFlag, model_folder
from training.errors import RecipeError
from training.evaluation.result_tables import generation_table, hellaswag_table, prediction_table
from training.evaluation.tables import ResultTable, require_writable, show

if TYPE_CHECKING:
    from model.sampling_params import SamplingParams
    from training.evaluate import LoadedCheckpoint
    from training.evaluation.progress import OnProgress
    from training.evaluation.samples import GeneratedText

_PREDICTION, _WRITING = "Prediction of a text", "Generated texts"
_OUTPUT = "Output"


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="checkpoint folder or name on the Hub; --samples alone needs none")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="further files of --text", metavar="TEXT")] = None,
    data: Annotated[
        Path | None, typer.Option(help="prepared data folder, or raw token files", rich_help_panel=_PREDICTION)
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="text, JSON lines or parquet, also .gz or .zst; of any size", rich_help_panel=_PREDICTION),
    ] = None,
    text_key: Annotated[
        list[str] | None,
        typer.Option(
            help="field of a row that holds its text (default: text); several are joined", rich_help_panel=_PREDICTION
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="of --data: train, val, or test where it was prepared", rich_help_panel=_PREDICTION)
    ] = "val",
    seq_len: Annotated[
        int | None,
        typer.Option(help="predictions in a window; default: the model's context", rich_help_panel=_PREDICTION),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="windows begin so far apart and overlap; the last so many predictions of each count; default: seq-len",
            rich_help_panel=_PREDICTION,
        ),
    ] = None,
    hellaswag: Annotated[
        str | None,
        typer.Option(help="multiple choice: HellaSwag's JSON lines, also .gz, or hf:OWNER/NAME@SPLIT (extra datasets)"),
    ] = None,
    generate_from: Annotated[
        Path | None,
        typer.Option(
            help='prompts to continue: JSON lines with "prompt" and, for BLEU, "reference" or "references"; '
            "or plain text, one a line",
            rich_help_panel=_WRITING,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help='texts generated already: JSON lines with "text", and references as above', rich_help_panel=_WRITING
        ),
    ] = None,
    save_samples: Annotated[
        Path | None, typer.Option(help="JSON lines for the texts of --generate-from", rich_help_panel=_WRITING)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="tokens to generate", rich_help_panel=_WRITING)] = 128,
    temperature: Annotated[float, typer.Option(help="0 = greedy", rich_help_panel=_WRITING)] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 = off", rich_help_panel=_WRITING)] = 0,
    top_p: Annotated[float, typer.Option(help="1 = off", rich_help_panel=_WRITING)] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 = off", rich_help_panel=_WRITING)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 = off", rich_help_panel=_WRITING)] = 1.0,
    seed: Annotated[int, typer.Option(help="of the first prompt; the next has the next", rich_help_panel=_WRITING)] = 0,
    control: Annotated[
        list[str] | None,
        typer.Option(help="name=value, declared when the data was prepared; repeatable", rich_help_panel=_WRITING),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="regular expression; the share of lines that hold it, for a metre or a form that spelling shows",
            rich_help_panel=_WRITING,
        ),
    ] = None,
    bleu_tokenize: Annotated[
        Literal["13a", "intl", "char", "none"],
        typer.Option(help="how sacrebleu divides text (extra evaluation)", rich_help_panel=_WRITING),
    ] = "13a",
    limit: Annotated[
        int | None, typer.Option(min=1, help="only so many rows of --hellaswag, --generate-from or --samples")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows, endings or prompts at a time")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON file for the results", rich_help_panel=_OUTPUT)] = None,
    force: Annotated[bool, typer.Option(help="replace files that exist", rich_help_panel=_OUTPUT)] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure a checkpoint: loss, perplexity and bits per byte of a text; accuracy on HellaSwag; BLEU, diversity and
    repetition of what it generates. Several at once where several are named. Coherence is for readers to judge."""
    from model.sampling_params import SamplingParams
    from training.evaluation.hellaswag_rows import read_items
    from training.evaluation.progress import progress_bars
    from training.evaluation.samples import check_measures, read_prompts, read_samples, score, write_samples

    texts = _texts(text, more)
    needs_model = data is not None or bool(texts) or hellaswag is not None or generate_from is not None
    _check(needs_model, checkpoint, samples, generate_from, save_samples)
    require_writable("--out", out, force=force)
    require_writable("--save-samples", save_samples, force=force)
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    params.require_tokens()
    # What is wrong with a file is told before a model is loaded and hours of measuring begin.
    items = None if hellaswag is None else read_items(hellaswag, limit)
    prompts = None if generate_from is None else read_prompts(generate_from, limit)
    written = None if samples is None else read_samples(samples, limit)
    check_measures(prompts or written or (), tokenize=bleu_tokenize, pattern=pattern)
    values: dict[str, Any] = {}
    tables: list[ResultTable] = []
    with progress_bars(enabled=not as_json) as on_progress:
        if checkpoint is not None and needs_model:
            from training.build import DTYPES
            from training.evaluate import TextSource, open_checkpoint

            loaded = open_checkpoint(model_folder(checkpoint), device=device, dtype=DTYPES[dtype])
            if data is not None or texts:
                source = TextSource(data, split, texts, text_key or ("text",))
                values |= loaded.evaluate(
                    source, seq_len=seq_len, stride=stride, batch_size=batch_size, on_progress=on_progress
                ).values()
                tables.append(prediction_table(values))
            if items is not None:
                from training.evaluation.hellaswag import multiple_choice

                values["hellaswag"] = multiple_choice(
                    loaded.model, loaded.tokenizer, items, batch_size=batch_size, on_progress=on_progress
                ).values()
                tables.append(hellaswag_table(values["hellaswag"]))
            if prompts is not None:
                written = _generate(loaded, prompts, params, control or (), batch_size, on_progress)
    if written is not None:
        if save_samples is not None:
            write_samples(save_samples, written)
        values["generation"] = score(written, tokenize=bleu_tokenize, pattern=pattern)
        tables.append(generation_table(values["generation"]))
    show(values, tables, as_json=as_json, out=out)


def _texts(text: list[Path] | None, more: list[Path] | None) -> list[Path]:
    if more and not text:
        raise RecipeError(f"{more[0]} stands behind the checkpoint; name text files with --text")
    return [*(text or ()), *(more or ())]


def _check(
    needs_model: bool,
    checkpoint: Path | None,
    samples: Path | None,
    generate_from: Path | None,
    save_samples: Path | None,
) -> None:
    if checkpoint is None and (needs_model or samples is None):
        raise typer.BadParameter("name a checkpoint folder; only --samples needs none", param_hint="CHECKPOINT")
    if not needs_model and samples is None:
        raise RecipeError("nothing to measure: give --data, --text, --hellaswag, --generate-from or --samples")
    if samples is not None and generate_from is not None:
        raise RecipeError("give either --generate-from or --samples")
    if save_samples is not None and generate_from is None:
        raise RecipeError("--save-samples keeps what --generate-from generates; give that too")


def _generate(
    loaded: LoadedCheckpoint,
    prompts: Sequence[GeneratedText],
    params: SamplingParams,
    controls: Sequence[str],
    batch_size: int,
    on_progress: OnProgress,
) -> list[GeneratedText]:
    from model.controls import read_controls
    from model.packed_model import pack_model
    from training.evaluation.generating import generate_texts
    from training.generate import TextGenerator

    # As `generate` does, whose texts these shall be.
    generator = TextGenerator(pack_model(loaded.model), loaded.tokenizer, controls=read_controls(loaded.folder))
    return generate_texts(generator, prompts, params, controls=controls, batch_size=batch_size, on_progress=on_progress)
