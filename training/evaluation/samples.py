"""Texts that a model generated, and how good they are by measures that need no reader. Free of torch.

    python -m training evaluate CHECKPOINT --generate-from prompts.jsonl --save-samples samples.jsonl
    python -m training evaluate --samples samples.jsonl

Prompts are rows {"prompt": …}, samples rows {"text": …}; both may hold "reference" or "references", the texts that BLEU
compares with. A plain text file is one prompt, or one sample, a line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from model.atomic_folder import replace_file
from training.data.compressed import Meter
from training.data.readers import ReadOptions, file_format, read_file
from training.errors import DataError
from training.evaluation.json_rows import read_rows
from training.evaluation.text_metrics import (
    BleuTokenizer,
    bleu,
    bleu_metric,
    compiled,
    pattern_matches,
    text_statistics,
)


class _Row(msgspec.Struct, omit_defaults=True):
    prompt: str | None = None
    text: str | None = None
    reference: str | None = None
    references: list[str] = []
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A text with what it is compared with; `tokens` counts the generated ones where that is known."""

    prompt: str | None
    text: str
    references: tuple[str, ...] = ()
    tokens: int | None = None


def read_prompts(path: Path, limit: int | None = None) -> list[GeneratedText]:
    """Samples whose texts are still to be generated. Raises DataError, naming the row, for one without a prompt."""
    rows = _read(path, "prompt", limit)
    return [GeneratedText(row.prompt or "", "", _references(row)) for row in rows]


def read_samples(path: Path, limit: int | None = None) -> list[GeneratedText]:
    """Raises DataError, naming the row, for one without a text."""
    rows = _read(path, "text", limit)
    return [GeneratedText(row.prompt, row.text or "", _references(row), row.tokens) for row in rows]


def write_samples(path: Path, samples: Sequence[GeneratedText]) -> None:
    """JSON lines for `read_samples`, whole or not at all. Raises CheckpointError when the disk refuses."""
    rows = [{name: value for name, value in asdict(sample).items() if value not in (None, ())} for sample in samples]
    content = "".join(json.dumps({"text": ""} | row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(path, content.encode())


def check_measures(samples: Sequence[GeneratedText], *, tokenize: BleuTokenizer, pattern: str | None) -> None:
    """Before texts are generated: raise RecipeError for what `score` would refuse afterwards."""
    if any(sample.references for sample in samples):
        bleu_metric(tokenize)
    if pattern is not None:
        compiled(pattern)


def score(
    samples: Sequence[GeneratedText], *, tokenize: BleuTokenizer = "13a", pattern: str | None = None
) -> dict[str, Any]:
    """The measures of `text_metrics` as JSON values; `bleu` is None without references.

    BLEU is that of the samples that have references. Raises RecipeError or DataError.
    """
    texts = [sample.text for sample in samples]
    statistics = text_statistics(texts)
    compared = [sample for sample in samples if sample.references]
    score = (
        bleu([each.text for each in compared], [each.references for each in compared], tokenize) if compared else None
    )
    counts = [sample.tokens for sample in samples if sample.tokens is not None]
    return {
        "texts": statistics.texts,
        "mean_tokens": sum(counts) / len(counts) if counts else None,
        "mean_words": statistics.words,
        "mean_characters": statistics.characters,
        **{f"distinct_{order}": share for order, share in enumerate(statistics.distinct, start=1)},
        "diversity": statistics.diversity,
        "repetition": statistics.repetition,
        "bleu": None if score is None else asdict(score) | {"texts": len(compared)},
        "pattern": None if pattern is None else asdict(pattern_matches(texts, pattern)),
    }


def _read(path: Path, field: str, limit: int | None) -> list[_Row]:
    if file_format(path.name).kind == "text":
        pieces = read_file(path, str(path), ReadOptions(documents="line"), Meter())
        rows = [
            (f"{path}, line {number}", msgspec.convert({field: piece.text}, _Row))
            for number, piece in enumerate(pieces, start=1)
        ]
    else:
        rows = list(read_rows(path, _Row))
    rows = rows[:limit]
    for place, row in rows:
        if getattr(row, field) is None:
            raise DataError(f"{place}: has no {field!r}; every row must hold one")
    if not rows:
        raise DataError(f"{path}: holds no row; every line must hold a {field}")
    return [row for _, row in rows]


def _references(row: _Row) -> tuple[str, ...]:
    return tuple(row.references) if row.reference is None else (row.reference, *row.references)
