"""`python -m training evaluate`: how well a checkpoint predicts, chooses and writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from training.commands.options import DeviceOption, DtypeOption, JsonFlag
from training.errors import RecipeError
from training.evaluation.tables import ResultTable, require_writable, show

if TYPE_CHECKING:
    from model.sampling_params import SamplingParams
    from training.evaluate import LoadedCheckpoint
    from training.evaluation.progress import OnProgress
    from training.evaluation.samples import GeneratedText

_PREDICTION, _WRITING = "Prediction of a text", "Generated texts"
_OUTPUT = "Output"


def evaluate(
    checkpoint: Annotated[Path | None, typer.Argument(help="checkpoint folder; --samples alone needs none")] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="further files of --text", metavar="TEXT")] = None,
    data: Annotated[
        Path | None, typer.Option(help="prepared data folder, or raw token files", rich_help_panel=_PREDICTION)
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="text, JSON lines or parquet, also .gz or .zst; of any size", rich_help_panel=_PREDICTION),
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
    batch_size: Annotated[int, typer.Option(min=1, help="windows, or endings, at a time")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON file for the results", rich_help_panel=_OUTPUT)] = None,
    force: Annotated[bool, typer.Option(help="replace files that exist", rich_help_panel=_OUTPUT)] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure a checkpoint: loss, perplexity and bits per byte of a text; accuracy on HellaSwag; BLEU, diversity and
    repetition of what it generates. Several at once where several are named. Coherence is for readers to judge."""
    from model.sampling_params import SamplingParams
    from training.evaluation.progress import progress_bars

    texts = _texts(text, more)
    needs_model = data is not None or bool(texts) or hellaswag is not None or generate_from is not None
    _check(needs_model, checkpoint, samples, generate_from, save_samples)
    require_writable("--out", out, force=force)
    require_writable("--save-samples", save_samples, force=force)
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    values: dict[str, Any] = {}
    tables: list[ResultTable] = []
    with progress_bars(enabled=not as_json) as on_progress:
        loaded = _load(checkpoint, device, dtype) if checkpoint is not None and needs_model else None
        if loaded is not None and (data is not None or texts):
            from training.evaluate import TextSource

            result = loaded.evaluate(
                TextSource(data, split, texts), seq_len=seq_len, stride=stride, batch_size=batch_size,
                on_progress=on_progress,
            )  # fmt: skip
            values |= result.values()
            tables.append(_prediction_table(values))
        if loaded is not None and hellaswag is not None:
            values["hellaswag"] = _hellaswag(loaded, hellaswag, limit, batch_size, on_progress)
            tables.append(_hellaswag_table(values["hellaswag"]))
        if samples is not None or generate_from is not None:
            from training.evaluation.samples import score, write_samples

            written = _samples(loaded, samples, generate_from, limit, params, on_progress)
            if save_samples is not None:
                write_samples(save_samples, written)
            values["generation"] = score(written, tokenize=bleu_tokenize, pattern=pattern)
            tables.append(_generation_table(values["generation"]))
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


def _load(folder: Path, device: str, dtype: str) -> LoadedCheckpoint:
    from training.build import DTYPES
    from training.evaluate import open_checkpoint

    return open_checkpoint(folder, device=device, dtype=DTYPES[dtype])


def _hellaswag(
    loaded: LoadedCheckpoint, source: str, limit: int | None, batch_size: int, on_progress: OnProgress
) -> dict[str, Any]:
    from training.evaluation.hellaswag import multiple_choice, read_items

    items = read_items(source, limit)
    return multiple_choice(
        loaded.model, loaded.tokenizer, items, batch_size=batch_size, on_progress=on_progress
    ).values()


def _samples(
    loaded: LoadedCheckpoint | None,
    samples: Path | None,
    generate_from: Path | None,
    limit: int | None,
    params: SamplingParams,
    on_progress: OnProgress,
) -> list[GeneratedText]:
    from training.evaluation.samples import read_prompts, read_samples

    if samples is not None:
        return read_samples(samples, limit)
    assert loaded is not None
    assert generate_from is not None
    from training.evaluation.generating import generate_texts

    return generate_texts(loaded.model, loaded.tokenizer, read_prompts(generate_from, limit), params, on_progress)


def _prediction_table(values: dict[str, Any]) -> ResultTable:
    perplexity = values["perplexity"]
    rows = [
        ("loss", f"{values['loss']:.4f}", "nats per token"),
        ("perplexity", "overflow" if perplexity is None else f"{perplexity:.3f}", "exp(loss)"),
        ("bits per byte", f"{values['bits_per_byte']:.4f}", "of the text in UTF-8"),
        ("tokens", f"{values['tokens']:,}", "predicted"),
    ]
    return ResultTable("Prediction", ("", "", ""), rows, text_columns=(0, 2))


def _hellaswag_table(values: dict[str, Any]) -> ResultTable:
    rows = [
        ("acc", f"{values['acc']:.4f}", f"± {values['acc_stderr']:.4f}, by the sum over the ending's tokens"),
        ("acc_norm", f"{values['acc_norm']:.4f}", f"± {values['acc_norm_stderr']:.4f}, by the mean over them"),
        ("items", f"{values['items']:,}", f"{values['cut']:,} of them cut to the model's context"),
    ]
    return ResultTable("HellaSwag", ("", "", ""), rows, text_columns=(0, 2))


def _generation_table(values: dict[str, Any]) -> ResultTable:
    bleu, pattern = values["bleu"], values["pattern"]
    rows = [
        ("texts", f"{values['texts']:,}", ""),
        ("mean length", _number(values["mean_tokens"], ".1f"), "tokens"),
        ("", _number(values["mean_words"], ".1f"), "words"),
        ("", _number(values["mean_characters"], ".1f"), "characters"),
        *(
            (f"distinct-{order}", _number(values[f"distinct_{order}"]), "different n-grams over all")
            for order in (1, 2, 3, 4)
        ),
        ("diversity", _number(values["diversity"]), "mean of distinct-1 to distinct-4"),
        ("repetition", _number(values["repetition"]), "4-grams that stood in the same text before"),
        ("BLEU-4", _number(bleu and bleu["score"], ".2f"), bleu["signature"] if bleu else "no references"),
    ]
    if pattern is not None:
        rows.append(("pattern", _number(pattern["share"]), f"of {pattern['lines']:,} lines match {pattern['pattern']}"))
    return ResultTable("Generated texts", ("", "", ""), rows, text_columns=(0, 2))


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else f"{value:{form}}"
