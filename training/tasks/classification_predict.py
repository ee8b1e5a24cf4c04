"""Labels for texts from a saved classifier, and how many of them are right where the true ones are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.classifier import load_classifier
from model.classifier_config import text_ids
from model.tokenizer import Tokenizer
from training.build import resolve_device
from training.errors import DataError
from training.tasks.classification_batches import log_probabilities, report_on
from training.tasks.classification_metrics import ClassificationReport


@dataclass(frozen=True, slots=True)
class Prediction:
    """The likeliest label with its probability, and the probabilities of all labels."""

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Predictions:
    """In the order of the texts, of which `num_cut` were longer than the model reads. `report` needs true labels."""

    items: list[Prediction]
    num_cut: int
    report: ClassificationReport | None


def classify_texts(
    folder: Path, texts: Sequence[str], labels: Sequence[str] | None = None, *, batch_size: int, device: str,
    dtype: torch.dtype,
) -> Predictions:  # fmt: skip
    """Raises RecipeError, DataError for a label that the classifier does not know, or the model package's errors."""
    classifier = load_classifier(folder, dtype=dtype, device=resolve_device(device))
    known, limit = classifier.config.labels, classifier.config.context
    targets = None if labels is None else _indices(labels, known)
    ids = text_ids(Tokenizer.load(folder), list(texts), classifier.config.pad_token_id)
    log_probs = log_probabilities(classifier, [row[:limit] for row in ids], batch_size=batch_size, dtype=dtype)
    items = []
    for row in log_probs.exp().tolist():
        scores = dict(zip(known, row, strict=True))
        best = max(scores, key=scores.__getitem__)
        items.append(Prediction(best, scores[best], scores))
    report = None if targets is None else report_on(known, log_probs, targets)
    return Predictions(items, sum(len(row) > limit for row in ids), report)


def _indices(labels: Sequence[str], known: Sequence[str]) -> list[int]:
    index = {label: number for number, label in enumerate(known)}
    for label in labels:
        if label not in index:
            names = ", ".join(known[:10])
            raise DataError(f"label {label!r} is none of the classifier's ({names}); correct it or leave its rows out")
    return [index[label] for label in labels]
