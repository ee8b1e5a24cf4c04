"""The results of `evaluate` as tables. Free of torch."""

from __future__ import annotations

from typing import Any

from training.evaluation.tables import ResultTable


def prediction_table(values: dict[str, Any]) -> ResultTable:
    perplexity = values["perplexity"]
    rows = [
        ("loss", f"{values['loss']:.4f}", "nats per token"),
        ("perplexity", "overflow" if perplexity is None else f"{perplexity:.3f}", "exp(loss)"),
        ("bits per byte", f"{values['bits_per_byte']:.4f}", "of the text in UTF-8"),
        ("tokens", f"{values['tokens']:,}", "predicted"),
    ]
    return ResultTable("Prediction", ("", "", ""), rows, text_columns=(0, 2))


def hellaswag_table(values: dict[str, Any]) -> ResultTable:
    rows = [
        ("acc", f"{values['acc']:.4f}", f"± {values['acc_stderr']:.4f}, by the sum over the ending's tokens"),
        ("acc_norm", f"{values['acc_norm']:.4f}", f"± {values['acc_norm_stderr']:.4f}, by the mean over them"),
        ("items", f"{values['items']:,}", f"{values['cut']:,} of them cut to the model's context"),
    ]
    return ResultTable("HellaSwag", ("", "", ""), rows, text_columns=(0, 2))


def generation_table(values: dict[str, Any]) -> ResultTable:
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
